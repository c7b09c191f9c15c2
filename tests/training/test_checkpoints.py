"""A run that is killed, and continued by the same command, ends where it would have ended."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from biod2c.train_hf import train
from biod2c.training.checkpoints import checkpoint_to_continue, publish

TRAIN_HF = Path(__file__).parents[2] / "train_hf.py"


def losses(run: Path) -> list[tuple[float, float]]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def test_a_checkpoint_appears_whole_or_not_at_all(make_recipe, tmp_path, monkeypatch, capsys):
    """The disk fails while the second checkpoint is written: the first one is what the run continues from."""
    from biod2c.training import trainer

    recipe = make_recipe(save_strategy="steps", save_steps=2, max_steps=4, rows_per_image=2)
    whole = train(recipe, ["--output_dir", str(tmp_path / "whole")])
    output = tmp_path / "broken"

    def full_disk(written: Path, final: Path) -> None:
        if final.name == "checkpoint-4":
            (written / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        publish(written, final)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "publish", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train(recipe, ["--output_dir", str(output)])
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2"]
    train(recipe, ["--output_dir", str(output)])
    assert "checkpoint-4 was being written when the run stopped: left out, going on from" in capsys.readouterr().out
    assert losses(output) == losses(whole)
    assert not (output / "unfinished" / "checkpoint-4").exists()


def test_only_so_many_are_kept_and_no_pickled_arguments(make_recipe):
    output = train(make_recipe(save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=2), [])
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not list(output.rglob("training_args.bin"))


def test_what_a_folder_cannot_continue(make_recipe, tmp_path):
    recipe = make_recipe(save_strategy="steps", save_steps=1)
    output = train(recipe, [])
    with pytest.raises(ValueError, match=r"holds a run with train=\[.*\], not \['fusion'\]: give another output_dir"):
        train(recipe, ["--train", "[fusion]"])
    with pytest.raises(ValueError, match="no checkpoint there"):
        train(recipe, ["--resume_from_checkpoint", str(tmp_path / "nowhere")])
    assert checkpoint_to_continue(tmp_path, {}, None) is None
    train(recipe, ["--image_cache", "5", "--max_steps", "3"])  # these move no number
    assert len(losses(output)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(make_recipe, tmp_path, seed):
    """kill -9, again and again: across epochs (3 steps each), inside accumulation, in the middle of saving."""
    fields = {"max_steps": 14, "save_strategy": "steps", "save_steps": 3, "rows_per_image": 2}
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    recipe = make_recipe(**fields, **batches)
    whole = train(recipe, ["--output_dir", str(tmp_path / "whole")])
    output = tmp_path / "killed"
    command = [sys.executable, str(TRAIN_HF), str(recipe), "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    chance, kills = random.Random(seed), 0
    while True:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        newest = max((int(p.name.split("-")[1]) for p in output.glob("checkpoint-*")), default=0)
        wait_until(lambda: (output / f"checkpoint-{newest + 3}").exists() or process.poll() is not None, 120)  # noqa: B023
        time.sleep(chance.uniform(0, 0.15))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 2
    assert losses(output) == losses(whole)
    ends = [load_file(run / "model.safetensors") for run in (whole, output)]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
