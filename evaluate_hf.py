"""Ask a model every question of a data set's split and score the answers.

    python evaluate_hf.py --model M --data FOLDER_OR_HUB_NAME --config slake --split validation --output OUT

OUT/predictions.jsonl keeps each answer, OUT/scores.json the scores with intervals and blind baselines, OUT/run.json
what was asked of what. The same command again continues where it stopped; what is scored without sight shows with
`--image blank` and `--image shuffled`. The model is used through its public interface alone: processor, `generate`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset, Image, load_dataset
from datasets.utils import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from biod2c.evaluation import (
    MAX_NEW_TOKENS,
    ImageMode,
    answer_rows,
    append_predictions,
    build_scores,
    check_ids,
    claim_output,
    data_fingerprint,
    format_table,
    image_keys,
    model_fingerprint,
    read_predictions,
    read_rows,
    shown_rows,
)

VERSIONS_KEPT = ("torch", "transformers", "datasets", "sacrebleu", "rouge-score")


@dataclass(kw_only=True)
class EvaluateArguments:
    """Which model answers which rows, and where the answers go. Raises ValueError for a value that cannot be."""

    model: str = field(metadata={"help": "model folder or Hub name"})
    data: str = field(metadata={"help": "data set folder or Hub name, in the schema of dataset_builder"})
    output: str = field(metadata={"help": "folder for predictions.jsonl, scores.json and run.json"})
    config: str | None = field(default=None, metadata={"help": "configuration of the data set, such as slake"})
    split: str = field(default="validation", metadata={"help": "split to answer; baselines are fitted on train"})
    batch_size: int = field(default=32, metadata={"help": "questions a batch; those of one image stay together"})
    limit: int | None = field(default=None, metadata={"help": "answer only the first rows of the split"})
    max_new_tokens: int = field(default=MAX_NEW_TOKENS, metadata={"help": "longest answer, in tokens"})
    image: ImageMode = field(default="normal", metadata={"help": "show the image, plain grey, or another image"})

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.image not in get_args(ImageMode):
            raise ValueError(f"image must be one of {', '.join(get_args(ImageMode))}, not {self.image!r}")


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Answer what has no answer yet, score all rows, write the output folder's files and return the scores.

    Raises ValueError for a data set without the split or its columns, and for an output folder of another run.
    """
    dataset, train = load_splits(arguments)
    rows = read_rows(dataset)
    check_ids(rows)
    output = Path(arguments.output)
    claim_output(output, run_identity(arguments, dataset), run_notes(arguments))
    answered = answer_missing(arguments, dataset, rows, output / "predictions.jsonl")
    records = [answered[row["id"]] for row in rows[: arguments.limit]]
    scores = build_scores(records, read_rows(train) if train else [])
    (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return scores


def load_splits(arguments: EvaluateArguments) -> tuple[Dataset, Dataset | None]:
    """The split to answer and the training split (None without one), images undecoded."""
    splits = load_dataset(arguments.data, arguments.config)
    if arguments.split not in splits:
        raise ValueError(f"{arguments.data} has no split {arguments.split!r}; it has {', '.join(splits)}")
    splits = splits.cast_column("image", Image(decode=False))
    return splits[arguments.split], splits.get("train")


def run_identity(arguments: EvaluateArguments, dataset: Dataset) -> dict[str, Any]:
    """What decides each prediction; batch size and limit do not."""
    return {
        "model": model_fingerprint(arguments.model),
        "data": data_fingerprint(dataset),
        "image": arguments.image,
        "max_new_tokens": arguments.max_new_tokens,
    }


def run_notes(arguments: EvaluateArguments) -> dict[str, Any]:
    """The command and the versions it ran with, to read."""
    return {"arguments": asdict(arguments), "versions": {name: version(name) for name in VERSIONS_KEPT}}


def load_model(name: str) -> tuple[Any, Any]:
    """Model, on the GPU where there is one, and processor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, dtype="auto")
    return model.to(device).eval(), AutoProcessor.from_pretrained(name, trust_remote_code=True)


def answer_missing(
    arguments: EvaluateArguments, dataset: Dataset, rows: Sequence[dict[str, Any]], path: Path
) -> dict[str, dict[str, Any]]:
    """All predictions by id: those in the file `path`, and the missing ones, appended to it batch by batch."""
    answered = read_predictions(path)
    missing = [index for index, row in enumerate(rows[: arguments.limit]) if row["id"] not in answered]
    if not missing:
        return answered
    model, processor = load_model(arguments.model)
    batches = answer_rows(
        model,
        processor,
        dataset,
        missing,
        shown_rows(image_keys(rows), arguments.image),
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        blank=arguments.image == "blank",
    )
    with tqdm(total=len(missing), unit="question") as progress:
        for batch in batches:
            records = [{**rows[a.row], "prediction": a.prediction, "error": a.error} for a in batch]
            append_predictions(path, records)
            answered |= {record["id"]: record for record in records}
            progress.update(len(records))
    return answered


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own), print the scores and return the exit code."""
    (arguments,) = HfArgumentParser(EvaluateArguments).parse_args_into_dataclasses(argv)
    scores = evaluate(arguments)
    print(f"{arguments.model} on {arguments.data}: {arguments.config or 'default'}, {arguments.split}")
    print(f"image: {arguments.image}; decoding: greedy, at most {arguments.max_new_tokens} tokens")
    print(format_table(scores))
    print(f"Written: {arguments.output}/predictions.jsonl, scores.json, run.json")
    return 0


if __name__ == "__main__":
    from biod2c.cli import run

    sys.exit(run("evaluate", sys.argv[1:]))
