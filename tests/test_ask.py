"""`biod2c ask`, end to end on a tiny checkpoint: the answer, the JSON, the picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from biod2c import cli

QUESTION = "Which part of the body is this?"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Not square and 16 bits deep: what is shown must be stretched and scaled as what is answered."""
    pixels = np.random.default_rng(0).integers(0, 65535, (40, 60), dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def ask(capsys, *arguments: str | Path) -> str:
    assert cli.main(["ask", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_json_and_bare_answers_agree(tiny_checkpoint: Path, image: Path, capsys) -> None:
    answer = ask(capsys, image, QUESTION, "--model", tiny_checkpoint)
    record = json.loads(ask(capsys, image, QUESTION, "--model", tiny_checkpoint, "--json"))
    assert record == {
        "image": str(image),
        "question": QUESTION,
        "answer": answer.removesuffix("\n"),
        "model": str(tiny_checkpoint),
        "attention": None,
    }
    assert QUESTION not in answer


@pytest.mark.filterwarnings("ignore:Glyph")  # an untrained model may answer in control characters
def test_attention_is_drawn(tiny_checkpoint: Path, image: Path, capsys) -> None:
    look = image.with_name("look.png")
    record = json.loads(ask(capsys, image, QUESTION, "--model", tiny_checkpoint, "--json", "--attention", look))
    assert record["attention"] == str(look)
    with Image.open(look) as picture:
        assert picture.format == "PNG"


def test_an_empty_question_is_a_users_mistake(tiny_checkpoint: Path, image: Path, capsys) -> None:
    assert cli.main(["ask", str(image), " ", "--model", str(tiny_checkpoint)]) == 2
    assert "expected a question" in capsys.readouterr().err


def test_a_picture_format_that_does_not_exist(tiny_checkpoint: Path, image: Path, capsys) -> None:
    arguments = ["ask", str(image), QUESTION, "--model", str(tiny_checkpoint), "--attention", "look.nonsense"]
    assert cli.main(arguments) == 2
    assert "nonsense" in capsys.readouterr().err
