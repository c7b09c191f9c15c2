"""Checkpoints that are whole or not there, and the one that a run continues from.

A checkpoint is many files, written over seconds or minutes, and a job is killed whenever its queue likes. So each is
written under `unfinished/` and moved to its name, `checkpoint-<step>`, in one atomic rename once all its bytes are on
the disk: what has that name can be trusted, and what a kill left half-written never has it.

It holds what the run changes, and no copy of a frozen language model: a run that continues rebuilds the rest as it
began, from its recipe, and `biod2c merge` does the same to make a full checkpoint.
"""

import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .recipe import Recipe

UNFINISHED = "unfinished"
TRAINED_PARTS = "trained_parts.safetensors"
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


def has_frozen_parts(model: nn.Module) -> bool:
    return not all(parameter.requires_grad for parameter in model.parameters())


def save_trained_parts(model: PreTrainedModel, state: dict[str, Tensor] | None, folder: Path) -> None:
    """Write all tensors but the frozen parameters, so also BatchNorm's statistics, to `folder`."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    trained = {name: tensor for name, tensor in (state or model.state_dict()).items() if name not in frozen}
    model.save_pretrained(folder, state_dict=trained, max_shard_size="1TB")  # it knows which tensors are tied
    (folder / "model.safetensors").rename(folder / TRAINED_PARTS)


def load_trained_parts(model: PreTrainedModel, folder: Path) -> None:
    """Raises ValueError if the file holds other tensors than those of the parts of `model` that learn."""
    found = model.load_state_dict(load_file(folder / TRAINED_PARTS), strict=False)
    learn = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wrong := sorted(found.unexpected_keys) + sorted(learn.intersection(found.missing_keys)):
        raise ValueError(f"{folder / TRAINED_PARTS} does not fit this model: {len(wrong)} tensors such as {wrong[0]}")


class FreeSpace(TrainerCallback):
    """Ends a run before its first step if its checkpoints and its model will not fit on the disk."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if not args.should_save:
            return
        learn = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = _num_bytes(learn)
        optimizer = 2 * weights  # AdamW's two moments
        whole = weights if hasattr(model, "peft_config") else _num_bytes(model.parameters())
        needed = whole + self._more_checkpoints(args, state) * (weights + optimizer)
        free = shutil.disk_usage(args.output_dir).free
        if free < needed:
            raise ValueError(
                f"{args.output_dir}: {free / 2**30:.1f} GiB are free, and the run will write about "
                f"{needed / 2**30:.1f} GiB of checkpoints and model; make room, or lower save_total_limit"
            )

    def _more_checkpoints(self, args: TrainingArguments, state: TrainerState) -> int:
        """How many there will be at once, beside those that are there: one more is written before one is deleted."""
        if args.save_strategy == "no":
            return 0
        epoch = math.ceil(state.max_steps / args.num_train_epochs)
        left = (state.max_steps - state.global_step) // (state.save_steps if args.save_strategy == "steps" else epoch)
        there = len(list(Path(args.output_dir).glob("checkpoint-*")))
        return left if args.save_total_limit is None else max(min(left, args.save_total_limit + 1 - there), 0)


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    # ZeRO-3 leaves an empty tensor where a parameter was, and its size beside it
    return sum(parameter.element_size() * getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


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
