"""`biod2c merge RUN OUTPUT`: one full checkpoint from adapters, or from a checkpoint of a run that goes on."""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers.trainer_utils import set_seed

from ..cli import ArgumentParser
from ..modeling_biod2c import BioD2CForConditionalGeneration
from ..processing_biod2c import BioD2CProcessor
from .checkpoints import TRAINED_PARTS, load_trained_parts
from .model import build_model, frozen_dtype, select_parts
from .recipe import load_recipe
from .rows import load_rows


def merge(trained: Path, output: Path) -> None:
    """Join what the folder `trained` holds and what it was trained on top of, and save that whole in `output`.

    `trained` holds either adapters and the parts that trained beside them (the output folder of a run with lora, or one
    of its checkpoints), or the trained parts alone (a checkpoint of another run, whose recipe stands beside it). The
    processor comes from `trained` too.

    Raises:
        ValueError: if `trained` holds neither.
    """
    if (trained / "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(str(trained)).base_model_name_or_path
        base_model = BioD2CForConditionalGeneration.from_pretrained(base)
        model = PeftModel.from_pretrained(base_model, str(trained)).merge_and_unload()
    elif (trained / TRAINED_PARTS).is_file():
        model = _rebuild(trained)
    else:
        raise ValueError(
            f"{trained}: no adapter_config.json and no {TRAINED_PARTS}; expected the output_dir of a recipe that "
            "trains lora, or a checkpoint"
        )
    model.save_pretrained(output)
    BioD2CProcessor.from_pretrained(trained).save_pretrained(output)


def _rebuild(checkpoint: Path) -> BioD2CForConditionalGeneration:
    recipe, arguments, _ = load_recipe(checkpoint.parent / "recipe.yaml", [])
    set_seed(arguments.seed)
    model, _ = build_model(recipe, load_rows(recipe, "train", arguments.seed), arguments)
    model = select_parts(model, recipe, frozen_dtype(recipe, arguments))
    load_trained_parts(model, checkpoint)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="biod2c merge", description=__doc__)
    parser.add_argument("trained", type=Path, help="output_dir of a recipe that trains lora, or a checkpoint in one")
    parser.add_argument("output", type=Path, help="folder for the full checkpoint")
    arguments = parser.parse_args(argv)
    merge(arguments.trained, arguments.output)
    print(f"wrote {arguments.output}")
