"""`biod2c ask IMAGE "QUESTION"`: one answer, and on request a picture of where the model looked.

Unusual here: the model is loaded as any user of the Hub would, through transformers' Auto classes with
`trust_remote_code=True`, so the code that runs is the checkpoint's own copy. Ask only checkpoints that you trust.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    PreTrainedModel,
    ProcessorMixin,
)

from .attention_maps import heat_maps, save_overlay
from .cli import ArgumentParser
from .image_processing_biod2c import open_image, upright_rgb

DEMO_CHECKPOINT = "out/demo/checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the answer to one question about one image; returns the exit code."""
    arguments = parse_arguments(argv)
    image = upright_rgb(open_image(arguments.image))
    model, processor = load(arguments.model)
    inputs = processor(images=image, text=arguments.question, return_tensors="pt").to(model.device, model.dtype)
    answer = generate_answer(model, processor, inputs)
    if arguments.attention:
        heat = heat_maps(model, inputs)[0]
        save_overlay(image, heat, arguments.attention, question=arguments.question, answer=answer)
    print(json.dumps(record(arguments, answer), ensure_ascii=False) if arguments.json else answer)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="biod2c ask", description="Ask a model a question about an image.")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    parser.add_argument("question", metavar="QUESTION", help="in words, quoted")
    parser.add_argument(
        "--model",
        default=DEMO_CHECKPOINT,
        help="a checkpoint's folder or Hub name (default: %(default)s, which `make demo` leaves); its own code is run",
    )
    parser.add_argument("--attention", type=Path, metavar="PNG", help="save a picture of where the model looked")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the bare answer")
    arguments = parser.parse_args(argv)
    if not arguments.image.is_file():
        parser.error(f"{arguments.image}: no such image file")
    if not Path(arguments.model).is_dir() and arguments.model.count("/") != 1:
        parser.error(f"{arguments.model}: no such checkpoint folder; `make demo` makes {DEMO_CHECKPOINT}")
    return arguments


def load(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model, on the GPU where there is one, and its processor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True).eval().to(device)
    return model, AutoProcessor.from_pretrained(name, trust_remote_code=True)


def generate_answer(model: PreTrainedModel, processor: ProcessorMixin, inputs: BatchFeature) -> str:
    """The greedy answer to the one question in `inputs`, without the prompt."""
    sequences = model.generate(**inputs, max_new_tokens=96, do_sample=False)
    new_tokens = sequences[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new_tokens, skip_special_tokens=True).strip()


def record(arguments: argparse.Namespace, answer: str) -> dict[str, str | None]:
    """What `--json` prints."""
    return {
        "image": str(arguments.image),
        "question": arguments.question,
        "answer": answer,
        "model": arguments.model,
        "attention": str(arguments.attention) if arguments.attention else None,
    }


if __name__ == "__main__":
    sys.exit(main())
