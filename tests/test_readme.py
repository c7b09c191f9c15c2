"""README.md keeps its word: the card's metadata, the Python it shows, and every command, path and name in it."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from biod2c import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))


def test_front_matter_says_what_the_hub_needs() -> None:
    card = ModelCard(README).data
    assert (card.license, card.library_name, card.pipeline_tag) == ("apache-2.0", "transformers", "image-text-to-text")
    assert card.language == ["en"]
    assert card.datasets
    assert card.metrics


def test_the_two_commands_come_first() -> None:
    assert re.findall(r"^make \w+", COMMANDS, re.MULTILINE) == ["make demo", "make test"]
    assert README.index("make demo") < README.index("\n## ")


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_compile_and_import_what_exists(snippet: str) -> None:
    imports = [node for node in ast.parse(snippet).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    exec("\n".join(map(ast.unparse, imports)), {})


def test_the_question_snippet_answers(tiny_checkpoint: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    (snippet,) = [snippet for snippet in SNIPPETS if "model.generate" in snippet]
    exec(snippet.replace("out/demo/checkpoint", str(tiny_checkpoint)), {})
    assert capsys.readouterr().out.endswith("\n")


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= set(targets)


def test_verbs_exist() -> None:
    used = set(re.findall(r"^biod2c (\w+)", COMMANDS, re.MULTILINE))
    assert used
    assert used <= cli.VERBS.keys()


@pytest.mark.parametrize("arguments", re.findall(r"^biod2c (convert .*)", COMMANDS, re.MULTILINE))
def test_convert_commands_are_understood(arguments: str, monkeypatch, tmp_path, capsys) -> None:
    """They come as far as finding that the weights are not there."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.split()) == 2
    assert "no such file" in capsys.readouterr().err


def named_paths() -> list[str]:
    """In backquotes: what ends as a file of ours does or in a slash; but for what commands make."""
    quoted = re.findall(r"`([\w./-]+(?:\.py|\.txt|\.cff|\.md|/))`", README)
    return sorted({path for path in quoted if not path.startswith("out/")} | {"examples/README.md", "tests/golden"})


@pytest.mark.parametrize("path", named_paths())
def test_named_paths_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", re.findall(r"\| `(\w+)`(?:, `(\w+)`)?", README.split("## The paper and the code")[1]))
def test_named_classes_exist(name: tuple[str, str]) -> None:
    modeling = importlib.import_module("biod2c.modeling_biod2c")
    assert all(hasattr(modeling, part) for part in name if part)
