"""Train BioD2C from a recipe: stage 1, stage 2 or an ablation (paper section 4.1).

    python train_hf.py recipes/demo/stage1.yaml [--field value ...]
    torchrun --nproc_per_node 4 train_hf.py recipes/stage2.yaml --deepspeed recipes/zero2.json

The same command again continues from the last checkpoint in `output_dir`. The recipe with its overrides is saved there
too, and a model card; `--push_to_hub true [--hub_model_id org/name]` pushes them with the model, under the token of
HF_TOKEN or `hf auth login`.
"""

import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from datasets import IterableDataset
from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import set_seed

from biod2c.training.checkpoints import FreeSpace, checkpoint_to_continue
from biod2c.training.data import AnswerCollator, BadSampleLimit
from biod2c.training.held_out import draw_losses
from biod2c.training.hub import RECORD, open_repository, push_run, write_card
from biod2c.training.launch import leave_processes, start_deepspeed, whole_model
from biod2c.training.model import build_model, frozen_dtype, parts_table, select_parts
from biod2c.training.recipe import Recipe, load_recipe
from biod2c.training.rows import RowStream, load_rows
from biod2c.training.trainer import BioD2CTrainer


def train(recipe_path: Path, overrides: list[str]) -> Path:
    """Run a recipe to its end and return the folder of what it made.

    Raises:
        ValueError: for a recipe, dataset or checkpoint that cannot be used, before any step.
    """
    recipe, arguments, values = load_recipe(recipe_path, overrides)
    arguments.remove_unused_columns = False  # the collator reads the columns
    repo = open_repository(recipe, arguments) if arguments.push_to_hub and arguments.process_index == 0 else None
    arguments.push_to_hub = False  # done here, once, at the end (see training/hub.py)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    start_deepspeed(arguments)
    start = checkpoint_to_continue(output, values, arguments.resume_from_checkpoint)
    bad_samples = output / "bad_samples.jsonl"
    set_seed(arguments.seed)
    rows = load_rows(recipe, "train", arguments.seed)
    eval_rows = load_rows(recipe, "eval") if any(one["eval_split"] for one in recipe.datasets) else None
    num_rows = None if recipe.streaming else len(rows) + len(eval_rows or [])
    with whole_model():
        model, processor = build_model(recipe, rows, arguments)
    model = select_parts(model, recipe, frozen_dtype(recipe, arguments))
    trainer = BioD2CTrainer(
        model=model,
        args=arguments,
        train_dataset=stream_rows(rows, recipe, arguments, start) if recipe.streaming else rows,
        eval_dataset=eval_rows,
        data_collator=AnswerCollator(processor, model.config.semantic_queue_size, recipe.image_cache, bad_samples),
        callbacks=[FreeSpace(), BadSampleLimit(bad_samples, num_rows, recipe.bad_sample_limit)],
        processing_class=processor,
        rows_per_image=recipe.rows_per_image,
        eval_questions=recipe.eval_questions,
    )
    if recipe.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping_patience))
    if trainer.is_world_process_zero():
        print(parts_table(model))
        print(f"{trainer.accelerator.distributed_type.value}, processes: {trainer.accelerator.num_processes}")
        (output / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        (output / RECORD).unlink(missing_ok=True)  # what it was pushed as is about to change
        if start is None:
            bad_samples.unlink(missing_ok=True)  # another run's
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        draw_losses(trainer.state.log_history, output / "losses.png")
        splits = {recipe.train_split: rows}
        if eval_rows is not None:
            splits[recipe.eval_split or "held out"] = eval_rows
        write_card(output, recipe, values, splits, trainer.state, repo)
        if repo:
            print(f"pushed {push_run(output, repo)}")
    return output


def stream_rows(rows: IterableDataset, recipe: Recipe, arguments: TrainingArguments, start: str | None) -> RowStream:
    """The rows of the whole run, of which those before the checkpoint `start` are only counted."""
    # every process reads the stream and takes its part; accelerate would else concatenate batches of unlike shapes
    arguments.accelerator_config.dispatch_batches = False
    done = TrainerState.load_from_json(str(Path(start, "trainer_state.json"))).global_step if start else 0
    return RowStream(
        rows,
        round_size=arguments.train_batch_size * arguments.world_size,
        rounds=arguments.max_steps * arguments.gradient_accumulation_steps,
        done=0 if arguments.ignore_data_skip else done * arguments.gradient_accumulation_steps,
        shuffled=recipe.shuffle_buffer > 0,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`RECIPE.yaml [--field value ...]`: `python train_hf.py --help` lists the fields."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["--help"], ["-h"]):
        print(f"usage: train_hf.py RECIPE.yaml [--field value ...]\n\n{__doc__}\n{inspect.getdoc(Recipe)}")
        print("\nand every field of transformers' TrainingArguments (learning_rate, max_steps, deepspeed ...)")
        return
    if not argv or argv[0].startswith("-"):
        raise ValueError("which recipe? train_hf.py RECIPE.yaml [--field value ...]")
    output = train(find_recipe(argv[0]), argv[1:])
    leave_processes()
    if os.environ.get("RANK", "0") == "0":
        print(f"wrote {output}")


def find_recipe(name: str) -> Path:
    """A recipe's file; a name such as `ablations/wo_fusion` stands for one that comes with the package."""
    packaged = Path(__file__).parent / "recipes" / f"{name.removesuffix('.yaml')}.yaml"
    return packaged if packaged.is_file() and not Path(name).exists() else Path(name)


if __name__ == "__main__":
    from biod2c.cli import run

    sys.exit(run("train", sys.argv[1:]))
