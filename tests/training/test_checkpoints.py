"""A run that is killed, and continued by the same command, ends where it would have ended."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from biod2c.train_hf import train
from biod2c.training.checkpoints import TRAINED_PARTS, checkpoint_to_continue, publish
from biod2c.training.merge import merge

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


def test_no_checkpoint_copies_what_is_frozen(make_recipe, tmp_path):
    """Stage 1: its checkpoints hold the fusion module; they continue, they merge, the best of them is loaded."""
    base = train(make_recipe("base.yaml", output_dir=str(tmp_path / "base"), max_steps=1), [])
    start = {"model": str(base), "vocab_size": None, "config": {}, "train": ["fusion"]}
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train(make_recipe(**start, **saving, output_dir=str(tmp_path / "whole")), [])
    for checkpoint in (whole / "checkpoint-2", whole / "checkpoint-4"):
        assert not (checkpoint / "model.safetensors").exists()
        kept = {name.split(".")[0] for name in load_file(checkpoint / TRAINED_PARTS) if "running_" not in name}
        assert "fusion" in kept and "language_model" not in kept
    merge(whole / "checkpoint-4", tmp_path / "merged")
    ours, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", whole))
    assert ours.keys() == expected.keys() and all(ours[name].equal(expected[name]) for name in expected)

    shutil.rmtree(whole / "checkpoint-4")
    before = losses(whole)
    train(tmp_path / "recipe.yaml", [])
    assert losses(whole) == before
    assert all(load_file(whole / "model.safetensors")[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("parts", "in_checkpoint", "in_run"),
    [
        (["fusion"], TRAINED_PARTS, "model.safetensors"),
        (["fusion", "lora"], "adapter_model.safetensors", "adapter_model.safetensors"),
    ],
)
def test_the_best_checkpoint_is_what_is_saved(make_recipe, tmp_path, parts, in_checkpoint, in_run):
    """A learning rate that only does damage: the last evaluation is not the best."""
    base = train(make_recipe("base.yaml", output_dir=str(tmp_path / "base"), max_steps=1), [])
    start = {"model": str(base), "vocab_size": None, "config": {}, "train": parts, "learning_rate": 10.0}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_nll_loss", "greater_is_better": False}
    steps = {"eval_split": "validation", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    output = train(make_recipe(**start, **best, **steps, save_steps=1, max_steps=3, warmup_steps=1), [])
    state = json.loads((output / "trainer_state.json").read_text())
    saved = load_file(output / in_run)
    for name, tensor in load_file(Path(state["best_model_checkpoint"]) / in_checkpoint).items():
        assert saved[name].equal(tensor), name
    assert state["best_global_step"] < 3


def test_a_disk_too_full_is_noticed_before_the_first_step(make_recipe, tmp_path, monkeypatch):
    """40 checkpoints do not fit into 20 MiB, two do."""
    recipe = make_recipe(save_strategy="steps", save_steps=1, max_steps=40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20 * 2**20))
    with pytest.raises(ValueError, match=r"0\.0 GiB are free, and the run will write about .* lower save_total_limit"):
        train(recipe, ["--output_dir", str(tmp_path / "full")])
    assert not list((tmp_path / "full").glob("checkpoint-*"))
    train(recipe, ["--output_dir", str(tmp_path / "fits"), "--save_total_limit", "1", "--max_steps", "2"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(make_recipe, tmp_path, wait_until, seed):
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
