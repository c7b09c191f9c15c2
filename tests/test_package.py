"""The repository as a package: lazy imports, the console script, what it declares to need and what is pinned."""

import ast
import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import biod2c
from biod2c import cli

ROOT = Path(__file__).parents[1]
INSTALLED_EXTRAS = ("train", "data", "dicom", "eval", "app", "generate", "deepspeed", "quantization", "dev")
HEAVY = ("torch", "transformers", "numpy", "PIL", "datasets")


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    script = Path(sys.executable).with_name("biod2c")
    return subprocess.run([script, *arguments], capture_output=True, text=True, timeout=60)


def exit_code(arguments: tuple[str, ...]) -> int | str | None:
    """What `biod2c arguments` exits with, run in this process, which has imported torch already."""
    try:
        return cli.main(arguments)
    except SystemExit as leaving:
        return leaving.code


# --- lazy imports


def test_this_checkout_is_what_is_imported() -> None:
    assert Path(biod2c.__file__).parent == ROOT


def test_importing_the_package_imports_nothing_heavy() -> None:
    result = run_python(f"import sys, biod2c; print([m for m in {HEAVY} if m in sys.modules], biod2c.__version__)")
    assert result.stdout == f"[] {biod2c.__version__}\n", result.stderr


@pytest.mark.parametrize("name", biod2c.__all__)
def test_public_names_come_on_demand(name: str) -> None:
    assert getattr(biod2c, name).__name__ == name
    assert name in dir(biod2c)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'BioD3C'"):
        biod2c.BioD3C  # noqa: B018


# --- the console script


def test_help_lists_each_verb_on_one_line_without_torch() -> None:
    result = run_python(
        "import atexit, sys; from biod2c.cli import main\n"
        f"atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules]))\n"
        "main(['--help'])"
    )
    assert result.returncode == 0
    for name, verb in cli.VERBS.items():
        assert re.search(rf"^ +{name} +{re.escape(verb.__doc__)}$", result.stdout, re.MULTILINE), result.stdout
    assert result.stdout.endswith("[]\n")


def test_the_installed_script() -> None:
    assert run_script("--version").stdout == f"biod2c {biod2c.__version__}\n"
    result = run_script("dance")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_explains_itself(verb: str, capsys) -> None:
    assert exit_code((verb, "--help")) == 0
    assert capsys.readouterr().out.startswith("usage:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "arguments are required: VERB"),
        (("dance",), "invalid choice: 'dance'"),
        (("ask",), "arguments are required: IMAGE, QUESTION"),
        (("ask", "nowhere.png", "What is this?"), "nowhere.png: no such image file"),
        (("ask", str(ROOT / "setup.cfg"), "What?", "--model", "no/model/here"), "no/model/here: no such checkpoint"),
        (("ask", str(ROOT / "setup.cfg"), "What?", "--model", "no/model"), "setup.cfg: not an image"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(arguments: tuple[str, ...], message: str, capsys) -> None:
    assert exit_code(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def fail_with(error: Exception):
    def verb(argv: list[str]) -> None:
        raise error

    return verb


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\nlines"), "biod2c ask: two lines\n"),
        (FileNotFoundError(2, "No such file", "a.yaml"), "biod2c ask: [Errno 2] No such file: 'a.yaml'\n"),
        (OSError(), "biod2c ask: OSError\n"),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            "biod2c ask: peft is not installed; "
            "pip install 'biod2c[train,data,eval,app,generate]' brings what every verb needs\n",
        ),
    ],
)
def test_errors_of_a_verb(monkeypatch, capsys, error: Exception, line: str) -> None:
    monkeypatch.setitem(cli.VERBS, "ask", fail_with(error))
    monkeypatch.delenv("BIOD2C_TRACEBACK", raising=False)
    assert cli.main(["ask"]) == 2
    assert capsys.readouterr().err == line


def test_traceback_on_request_and_for_our_own_mistakes(monkeypatch) -> None:
    monkeypatch.setitem(cli.VERBS, "ask", fail_with(TypeError("a bug")))
    with pytest.raises(TypeError):
        cli.main(["ask"])
    monkeypatch.setitem(cli.VERBS, "ask", fail_with(ValueError("a mistake")))
    monkeypatch.setenv("BIOD2C_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a mistake"):
        cli.main(["ask"])


# --- metadata, dependencies, pins


def test_metadata() -> None:
    metadata = importlib.metadata.metadata("biod2c")
    assert metadata["Version"] == biod2c.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"train", "data", "eval", "app", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == biod2c.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["preferred-citation"]["title"].startswith("BioD2C: A Dual-level Semantic Consistency")


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "constraints.txt holds exact versions only"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def requirements_of(name: str, extras: tuple[str, ...] = ("",)) -> Iterator[Requirement]:
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement


def installed_closure() -> set[str]:
    """Canonical names of all that biod2c with INSTALLED_EXTRAS pulls in on this machine."""
    found: set[tuple[str, str]] = set()
    waiting = list(requirements_of("biod2c", ("", *INSTALLED_EXTRAS)))
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in found if known == name}:
            found.add((name, extra))
            waiting += requirements_of(name, (extra,))
    return {name for name, _ in found}


def test_all_that_is_installed_is_pinned_to_the_version_that_is_installed() -> None:
    pinned = pins()
    closure = installed_closure()
    assert closure - pinned.keys() == set()
    for name in closure:
        assert importlib.metadata.version(name).split("+")[0] == pinned[name], name


def test_nothing_is_pinned_that_nothing_needs() -> None:
    assert pins().keys() - installed_closure() == set()


def package_files() -> list[Path]:
    """All that setup.cfg ships as code."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = setup["options"]["packages"].split()
    folders = [ROOT.joinpath(*package.split(".")[1:]) for package in packages]
    return [file for folder in folders for file in folder.glob("*.py")]


def third_party_imports(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module.partition(".")[0])
    return modules - sys.stdlib_module_names - {"biod2c"}


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_declared(path: Path) -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in importlib.metadata.requires("biod2c")}
    distributions = importlib.metadata.packages_distributions()
    for module in third_party_imports(path):
        assert {canonicalize_name(name) for name in distributions.get(module, [module])} & declared, module


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_what_is_there(path: Path) -> None:
    """They are run by hand; a name that has moved should not be noticed only then."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "biod2c":
            module = importlib.import_module(node.module)
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{node.module}: {missing}"


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git checkout")
@pytest.mark.parametrize("path", ["tests/golden/pure_seed0.safetensors", "model.safetensors", "examples/a.png"])
def test_no_committed_file_needs_git_lfs(path: str) -> None:
    result = subprocess.run(["git", "check-attr", "filter", "--", path], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == f"{path}: filter: unspecified\n"
