"""Two processes for real (torchrun, gloo): the same rows give the same losses as one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from biod2c.train_hf import train

pytestmark = pytest.mark.slow
TRAIN_HF = Path(__file__).parents[2] / "train_hf.py"


def test_two_processes_equal_one(make_recipe, tmp_path):
    """Answers of unequal length, rows without a queue: each process alone would weigh them otherwise."""
    common = ["--config.fusion_dropout", "0", "--max_steps", "3", "--lr_scheduler_type", "constant"]
    common += ["--train", "[fusion, language_model]"]
    one = train(make_recipe(), [*common, "--output_dir", str(tmp_path / "one")])
    two = tmp_path / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29531"]
    command = [*launcher, TRAIN_HF, make_recipe(), *common, "--output_dir", two, "--per_device_train_batch_size", "4"]
    result = subprocess.run(
        [*map(str, command), "--ddp_backend", "gloo"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[:3000]
    histories = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (one, two)]
    whole, shared = ([entry for entry in history if "loss" in entry] for history in histories)
    assert len(whole) == len(shared) == 3
    for alone, together in zip(whole, shared, strict=True):
        for name in ("loss", "nll_loss", "semantic_loss", "grad_norm"):
            assert together[name] == pytest.approx(alone[name], rel=1e-5), name
