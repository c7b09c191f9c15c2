"""`biod2c merge ADAPTER OUTPUT`: one full checkpoint from a run that trained LoRA adapters."""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig, PeftModel

from ..cli import ArgumentParser
from ..modeling_biod2c import BioD2CForConditionalGeneration
from ..processing_biod2c import BioD2CProcessor


def merge_adapter(adapter: Path, output: Path) -> None:
    """Add the adapters of the folder `adapter` to the base model that they name, and save it whole in `output`.

    The parts that trained whole beside the adapters (the fusion module) come from `adapter` too; so does the processor.

    Raises:
        ValueError: if `adapter` holds no adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter}: no adapter_config.json; expected the output_dir of a recipe that trains lora")
    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    model = PeftModel.from_pretrained(
        BioD2CForConditionalGeneration.from_pretrained(base), str(adapter)
    ).merge_and_unload()
    model.save_pretrained(output)
    BioD2CProcessor.from_pretrained(adapter).save_pretrained(output)


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="biod2c merge", description=__doc__)
    parser.add_argument("adapter", type=Path, help="output_dir of a recipe that trains lora")
    parser.add_argument("output", type=Path, help="folder for the full checkpoint")
    arguments = parser.parse_args(argv)
    merge_adapter(arguments.adapter, arguments.output)
    print(f"wrote {arguments.output}")
