"""Two processes for real (torchrun, gloo), and accumulated batches: the same rows give what one whole batch gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file

from biod2c.dataset_builder.schema import FEATURES

pytestmark = pytest.mark.slow
SAVE_GRADIENTS = Path(__file__).parent / "save_gradients.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(folder: Path, recipe: Path, *overrides: str, processes: int = 1) -> list[dict]:
    """Train in `folder` and return what was logged; the gradients lie in folder/gradients."""
    launcher, backend = (TORCHRUN, ["--ddp_backend", "gloo"]) if processes == 2 else ([], [])
    folder.mkdir()
    script = [SAVE_GRADIENTS, folder / "gradients", recipe, "--output_dir", folder / "run"]
    result = subprocess.run(
        [str(word) for word in [sys.executable, *launcher, *script, *overrides, *backend]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]


def batches(size: int, accumulation: int = 1) -> list[str]:
    return ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(accumulation)]


def assert_same(logged: list[dict], whole: list[dict], *names: str, rel: float) -> None:
    pairs = [(a[name], b[name]) for a, b in zip(logged, whole, strict=True) for name in names if name in b]
    assert len(pairs) >= len(names)
    for value, wanted in pairs:
        assert value == pytest.approx(wanted, rel=rel), names


def assert_same_gradients(run: Path, whole: Path) -> None:
    steps = sorted(path.name for path in (whole / "gradients").iterdir())
    assert len(steps) == 3
    for step in steps:
        gradients, wanted = (load_file(folder / "gradients" / step) for folder in (run, whole))
        gradients = {name.removeprefix("module."): gradient for name, gradient in gradients.items()}
        assert gradients.keys() == wanted.keys() and len(wanted) > 50
        for name, gradient in wanted.items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), (step, name)


def test_however_a_batch_is_cut_every_gradient_is_the_same(make_recipe, make_rows, tmp_path):
    """Answers of unequal length, rows without a queue, of which a part alone would be weighed otherwise; and held-out
    rows that do not divide among the processes, one of them damaged. The vision encoder is frozen: BatchNorm that
    trains sees a batch's own statistics."""
    held_out = make_rows(4, 4, first=6)[:13]
    held_out[12]["image"] = {"bytes": b"not an image", "path": None}
    for split, rows in {"train": make_rows(6, 4), "validation": held_out}.items():
        Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "data" / f"{split}.parquet")
    recipe = make_recipe(
        dataset=str(tmp_path / "data"),
        train=["fusion", "language_model"],
        max_steps=3,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        eval_split="validation",
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=3,
        bad_sample_limit=0.1,
    )
    one, four, two = (tmp_path / name for name in ("one", "four", "two"))
    dropout = ["--config.fusion_dropout", "0"]
    whole = run(one, recipe, *batches(8), *dropout)
    for folder, logged in {
        four: run(four, recipe, *batches(2, accumulation=4), *dropout),
        two: run(two, recipe, *batches(4), *dropout, processes=2),
    }.items():
        assert_same(logged, whole, "loss", "nll_loss", "semantic_loss", "grad_norm", rel=1e-5)
        assert_same(logged, whole, "eval_loss", "eval_nll_loss", "eval_semantic_loss", rel=1e-6)
        assert_same_gradients(folder, one)


def test_a_stream_is_shared_out(make_recipe, tiny_checkpoint, tmp_path):
    """By workers too, and over the end of its first pass (3 steps)."""
    start = {"model": str(tiny_checkpoint), "vocab_size": None, "config": {"fusion_dropout": 0}, "train": ["fusion"]}
    recipe = make_recipe(streaming=True, shuffle_buffer=10, max_steps=5, lr_scheduler_type="constant", **start)
    whole = run(tmp_path / "one", recipe, *batches(8))
    shared = run(tmp_path / "two", recipe, *batches(4), "--dataloader_num_workers", "2", processes=2)
    assert_same(shared, whole, "loss", "nll_loss", "semantic_loss", "grad_norm", rel=1e-5)
