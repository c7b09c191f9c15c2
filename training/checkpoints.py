"""Checkpoints that are whole or not there, and the one that a run continues from.

A checkpoint is many files, written over seconds or minutes, and a job is killed whenever its queue likes. So each is
written under `unfinished/` and moved to its name, `checkpoint-<step>`, in one atomic rename once all its bytes are on
the disk: what has that name can be trusted, and what a kill left half-written never has it.
"""

import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import get_last_checkpoint

from .recipe import Recipe

UNFINISHED = "unfinished"
# What may change between a run and its continuation: it moves no number
_FREE = {"image_cache", "bad_sample_limit", "eval_split", "eval_questions", "early_stopping_patience"}


def publish(written: Path, final: Path) -> None:
    """Move a finished checkpoint to its name, after its bytes have reached the disk."""
    for path in sorted(written.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    if final.exists():
        shutil.rmtree(final)
    written.rename(final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_to_continue(output: Path, values: dict[str, Any], named: str | None) -> str | None:
    """The checkpoint that this run goes on from: the one named, else the last whole one in `output`, else None.

    Raises:
        ValueError: if the one named is not there, or if `output` holds a run of another recipe.
    """
    if named is not None and not Path(named, "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint={named}: no checkpoint there (no trainer_state.json)")
    last = named or get_last_checkpoint(str(output))
    for leftover in sorted((output / UNFINISHED).glob("*")):
        print(f"{leftover.name} was being written when the run stopped: left out, going on from {last or 'the start'}")
    if last is not None:
        _refuse_another_recipe(Path(last).parent / "recipe.yaml", values)
    return last


def _refuse_another_recipe(saved: Path, values: dict[str, Any]) -> None:
    if not saved.is_file():
        return
    before = yaml.safe_load(saved.read_text())
    for name in [f.name for f in fields(Recipe) if f.name not in _FREE] + ["seed", "data_seed"]:
        if before.get(name) != values.get(name):
            raise ValueError(
                f"{saved.parent} holds a run with {name}={before.get(name)}, not {values.get(name)}: "
                "give another output_dir, or the recipe that it was started with"
            )
