"""`biod2c demo`, whole, in an empty folder: it must end with all it promises, and have learned to look."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow


def test_the_demo_learns_to_use_the_image(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "biod2c.cli", "demo"]
    result = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-3000:]
    output = tmp_path / "out/demo"
    scores = json.loads((output / "scores.json").read_text())
    assert (scores["n_closed"], scores["n_open"], scores["n_failed"], scores["n_images"]) == (422, 631, 0, 96)
    assert scores["margin_over_question_only"]["interval"][0] > 0.03
    predictions = (output / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 1053
    with Image.open(output / "attention.png") as picture:
        assert picture.width > 1000
    for name in ("biovgq/", "checkpoint/", "predictions.jsonl", "scores.json", "attention.png"):
        assert f"out/demo/{name}" in result.stdout
    assert (output / "checkpoint/modeling_biod2c.py").exists()
