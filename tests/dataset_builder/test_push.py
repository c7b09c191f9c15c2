"""A built dataset on a stub of the Hub: pushed, opened by its name, pushed again with other rows."""

import json
import os
import subprocess
import sys

from biod2c.cli import main

CHILD = """
import json
from datasets import load_dataset
rows = load_dataset("org/biovgq", "slake", split="train")
streamed = next(iter(load_dataset("org/biovgq", "slake", split="train", streaming=True)))
print(json.dumps([rows["answer"][:], rows[0]["image"].size, streamed["id"]]))
"""


def opened(hub, tmp_path):
    """What `load_dataset` gives for the Hub's name, in a process that has never seen the folder."""
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    result = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_pushed_opened_and_pushed_again(hub, make_slake, slake_row, tmp_path, capsys):
    root = make_slake({"train.json": [slake_row(1), slake_row(2, image=2), slake_row(3, answer_type="?")]})
    output = str(tmp_path / "out")
    ingest = ["build", "ingest", "--source", "slake", "--data", str(root), "--output", output]
    assert main(ingest) == 0
    hub.fail("/commit/", 503, times=1)  # passes
    assert main(["build", "push", output, "org/biovgq"]) == 0
    assert "pushed http" in capsys.readouterr().out
    assert opened(hub, tmp_path) == [["Liver", "Liver"], [40, 30], "slake-1"]
    first = hub.files("org/biovgq", "datasets")
    assert "bad_rows.jsonl" not in first and (tmp_path / "out" / "bad_rows.jsonl").stat().st_size

    (root / "train.json").write_text(json.dumps([slake_row(1, answer="Heart"), slake_row(2, image=2)]))
    assert main(ingest) == 0 and main(["build", "push", output, "org/biovgq"]) == 0
    assert opened(hub, tmp_path)[0] == ["Heart", "Liver"]
    second = hub.files("org/biovgq", "datasets")
    data = [{name for name in files if name.startswith("data/")} for files in (first, second)]
    assert len(data[0]) == len(data[1]) == 1 and data[0] != data[1]  # the old file is gone


def test_what_cannot_be_pushed(hub, make_slake, slake_row, tmp_path, capsys, monkeypatch):
    assert main(["build", "push", str(tmp_path), "org/biovgq"]) == 2
    assert "no finished build" in capsys.readouterr().err
    root, output = make_slake({"train.json": [slake_row(1)]}), str(tmp_path / "out")
    main(["build", "ingest", "--source", "slake", "--data", str(root), "--output", output])
    hub.fail("/commit/", 403)
    assert main(["build", "push", output, "org/biovgq"]) == 2
    error = capsys.readouterr().err
    assert "push to org/biovgq failed: 403" in error and f"whole in {output}" in error and hub.token not in error
    monkeypatch.delenv("HF_TOKEN")
    assert main(["build", "push", output, "org/biovgq"]) == 2
    assert "set HF_TOKEN" in capsys.readouterr().err
