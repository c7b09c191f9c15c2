"""The package as others install it: sdist and wheel built from a copy of the repository, the wheel in an empty venv.

Unusual here: the new environment borrows the heavy dependencies from the one that runs the tests, through a path file.
Path files inside a borrowed folder are not read, so the editable install there is invisible and what is imported is the
wheel. Nothing is downloaded.
"""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parents[2]
NOT_SOURCE = ignore_patterns(".*", "out", "build", "dist", "examples", "*.egg-info", "__pycache__")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as a release is: the sdist first, and the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("build")
    copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    (path,) = (folder / "dist").glob("biod2c-*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Iterator[Path]:
    """A fresh virtual environment with the wheel; yields its folder of scripts."""
    folder = wheel.parent / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    yield folder / "bin"


def modules_of(wheel: Path) -> list[str]:
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    return sorted(".".join(name.with_suffix("").parts).removesuffix(".__init__") for name in names)


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    markers = [*ROOT.glob("__init__.py"), *ROOT.glob("[a-z]*/__init__.py"), *ROOT.glob("[a-z]*/*/__init__.py")]
    expected = {path for marker in markers for path in marker.parent.glob("*.py")}
    expected |= {path for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    assert names == {f"biod2c/{path.relative_to(ROOT)}" for path in expected}


def test_script_works_outside_the_repository(environment: Path, tmp_path: Path) -> None:
    printed = run(environment / "biod2c", "--help", cwd=tmp_path)
    assert "ask a model a question about an image" in printed


def test_every_module_imports_from_the_wheel(wheel: Path, environment: Path, tmp_path: Path) -> None:
    modules = [name for name in modules_of(wheel) if not name.endswith("__main__")]
    assert "biod2c.modeling_biod2c" in modules
    code = f"import importlib, biod2c; [importlib.import_module(name) for name in {modules}]; print(biod2c.__file__)"
    imported_from = Path(run(environment / "python", "-c", code, cwd=tmp_path).splitlines()[-1])
    assert imported_from.is_relative_to(environment.parent)
