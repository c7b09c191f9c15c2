"""DeepSpeed for real, two processes without a GPU: ZeRO-2 with its optimizer off the device, and ZeRO-3.

Unusual here: DeepSpeed's C++ part is compiled once, into the project's .cache; the first test takes a minute
longer then.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from biod2c.train_hf import train
from biod2c.training.launch import build_cpu_ops
from biod2c.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
EXACT = ["--config.fusion_dropout", "0", "--lr_scheduler_type", "constant"]


def steps(run: Path) -> list[dict]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def train_on_two(recipe: Path, zero: str, output: Path, *overrides: str) -> str:
    """`torchrun --nproc_per_node 2 train_hf.py RECIPE --deepspeed ZERO`; returns what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, ROOT / "train_hf.py", recipe, "--deepspeed", ROOT / "recipes" / zero]
    command += ["--output_dir", output, "--per_device_train_batch_size", "4", *overrides]
    own = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"),
    }
    result = subprocess.run(map(str, command), env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert "DEEPSPEED, processes: 2" in result.stdout
    return result.stdout


def continue_from_2(run: Path) -> Path:
    """A copy of a run that was killed after its checkpoint-2."""
    copy = run.with_name(f"{run.name}-again")
    copy.mkdir()
    shutil.copytree(run / "checkpoint-2", copy / "checkpoint-2")
    shutil.copy(run / "recipe.yaml", copy)
    return copy


def assert_same_losses(run: Path, other: Path) -> None:
    """Two processes sum in another order than one; from there both runs drift apart by roundings."""
    for entry, expected in zip(steps(run), steps(other), strict=True):
        for name in ("loss", "nll_loss", "semantic_loss", "grad_norm"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-5), name


def weights_differ(run: Path, other: Path, file: str) -> list[str]:
    ours, theirs = load_file(run / file), load_file(other / file)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if ours[name].shape != theirs[name].shape or not ours[name].equal(theirs[name])]


@pytest.mark.slow
def test_zero2_with_offload_in_two_stages(make_recipe, tmp_path):
    """Stage 1 trains whole parts, stage 2 LoRA: losses of one process; continued from a checkpoint, the same bits."""
    pytest.importorskip("deepspeed")
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    first = make_recipe("first.yaml", **saving, train=["fusion", "language_model"])
    one, two = tmp_path / "one", tmp_path / "two"
    train(first, [*EXACT, "--output_dir", str(one)])
    train_on_two(first, "zero2.json", two, *EXACT)
    assert_same_losses(two, one)
    again = continue_from_2(two)
    train_on_two(first, "zero2.json", again, *EXACT)
    assert steps(again) == steps(two)
    assert weights_differ(again, two, "model.safetensors") == []

    start = {"model": str(two), "vocab_size": None, "config": {}, "train": ["fusion", "lora"], "lora": {"r": 4}}
    second = make_recipe("second.yaml", **saving, **start)
    one, lora = tmp_path / "one-lora", tmp_path / "lora"
    train(second, [*EXACT, "--output_dir", str(one)])
    train_on_two(second, "zero2.json", lora, *EXACT)
    assert_same_losses(lora, one)
    again = continue_from_2(lora)
    train_on_two(second, "zero2.json", again, *EXACT)
    assert steps(again) == steps(lora)
    assert weights_differ(again, lora, "adapter_model.safetensors") == []


@pytest.mark.slow
def test_zero3(make_recipe, tmp_path):
    """The split weights: losses of one process, saved whole, and continued from a checkpoint with the same bits."""
    pytest.importorskip("deepspeed")
    recipe = make_recipe(save_strategy="steps", save_steps=2, max_steps=4, train=["fusion", "language_model"])
    one, two = tmp_path / "one", tmp_path / "two"
    train(recipe, [*EXACT, "--output_dir", str(one)])
    train_on_two(recipe, "zero3.json", two, *EXACT)
    assert_same_losses(two, one)
    again = continue_from_2(two)
    train_on_two(recipe, "zero3.json", again, *EXACT)
    assert steps(again) == steps(two)
    assert weights_differ(again, two, "model.safetensors") == []
    whole = load_file(one / "model.safetensors")
    for name, weight in load_file(two / "model.safetensors").items():
        assert weight.shape == whole[name].shape and (weight - whole[name]).abs().max() < 1e-4, name


def test_what_this_machine_cannot_run(make_recipe, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="fsdp needs GPUs"):
        load_recipe(make_recipe(fsdp="full_shard"), [])
    with pytest.raises(ValueError, match=r"deepspeed (needs its launcher|is not installed)"):
        load_recipe(make_recipe(), ["--deepspeed", str(ROOT / "recipes" / "zero2.json")])
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="deepspeed is not installed"):
        load_recipe(make_recipe(), ["--deepspeed", str(ROOT / "recipes" / "zero2.json")])


def test_a_lock_that_a_killed_build_left_is_removed(tmp_path, monkeypatch):
    accelerator = pytest.importorskip("deepspeed.accelerator")
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    seen = []
    builder = SimpleNamespace(load=lambda verbose: seen.append(lock.exists()))
    monkeypatch.setattr(accelerator, "get_accelerator", lambda: SimpleNamespace(create_op_builder=lambda name: builder))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build_cpu_ops()
    assert seen == [False]
