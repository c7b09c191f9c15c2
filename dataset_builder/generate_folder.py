"""The verb `generate`: image-caption rows of a dataset in, question-answer rows out, as a dataset folder.

The only part of the step that knows how rows are stored. Beside the data lie replies.jsonl, the record (see
`generate_journal`), and rejected.jsonl, a line for each image or pair that gave no row, with its reason.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Image, load_dataset
from tqdm import tqdm

from .assemble import write_atomically
from .build import BuildResult, write_dataset
from .generate import GenerateOptions, ask, estimate, generated_rows
from .generate_checks import NearDuplicates
from .generate_endpoint import Model
from .generate_journal import GenerateError, Journal
from .recipe import Recipe, SourceOptions
from .report import Report
from .schema import FEATURES, Row

REPLIES = "replies.jsonl"
REJECTED = "rejected.jsonl"


def options_of(arguments: argparse.Namespace) -> GenerateOptions:
    """The options that the arguments spell. GenerateError for a budget that could not be kept, and for nonsense."""
    prices = [arguments.price] + ([arguments.blind_price] if arguments.check_blind else [])
    if arguments.budget is not None and None in prices:
        raise GenerateError("--budget needs --price (and --blind-price for --check-blind): dollars per million tokens")
    for name in ("concurrency", "timeout", "max_tokens"):
        if getattr(arguments, name) <= 0:
            raise GenerateError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected more than 0")
    limits = {"max_tokens": arguments.max_tokens, "image_tokens": arguments.image_tokens}
    price = arguments.price and tuple(arguments.price)
    model = Model(arguments.model, arguments.base_url, price=price, **limits)
    blind = None
    if arguments.check_blind:
        price = arguments.blind_price and tuple(arguments.blind_price)
        # the key of one endpoint is never sent to another
        variable = "BLIND_API_KEY" if arguments.blind_url else "OPENAI_API_KEY"
        blind = Model(arguments.check_blind, arguments.blind_url or arguments.base_url, variable, price, **limits)
    return GenerateOptions(model, blind, arguments.concurrency, budget=arguments.budget, timeout=arguments.timeout)


def run(arguments: argparse.Namespace) -> BuildResult | None:
    """Carry out the verb; after a dry run, which prints its estimate, None."""
    options, output = options_of(arguments), arguments.output
    splits = open_splits(arguments.dataset, arguments.config)
    if arguments.dry_run:
        print(estimate_line(options, splits, Journal(output / REPLIES)))
        return None
    check_output(output, arguments.dataset)
    secrets = [os.environ.get(name) for name in ("OPENAI_API_KEY", "BLIND_API_KEY")]
    with Journal(output / REPLIES, tuple(filter(None, secrets)), write=True) as journal:
        write_atomically(output / "build.json", "{}\n")  # ours, but not whole
        notes = ask(all_rows(splits), options, journal)
        print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
        return write(output, splits, options, journal)


def open_splits(dataset: str, config: str | None) -> dict[str, Any]:
    """The dataset's splits, images left as bytes. GenerateError if it cannot be opened or lacks a column."""
    try:
        splits = load_dataset(dataset, config)
    except (OSError, ValueError) as error:
        raise GenerateError(f"{dataset}: load_dataset cannot open it ({error})") from error
    for split, rows in splits.items():
        missing = sorted(FEATURES.keys() - rows.features.keys())
        if missing:
            raise GenerateError(f"{dataset}: split {split} lacks columns {missing}; make it with `ingest`")
    return {split: rows.cast_column("image", Image(decode=False)) for split, rows in splits.items()}


def check_output(output: Path, dataset: str) -> None:
    """GenerateError if the folder is the input itself or holds something else."""
    if Path(dataset).resolve() == output.resolve():
        raise GenerateError(f"{output}: is the dataset that is read; give another --output")
    ours = (output / REPLIES).exists() or not output.exists() or not any(output.iterdir())
    if not ours:
        raise GenerateError(f"{output}: not empty and without a {REPLIES} of this verb; give another --output")


def all_rows(splits: dict[str, Any]) -> Iterator[Row]:
    """The rows of all splits, with a progress bar on a terminal."""
    total = sum(rows.num_rows for rows in splits.values())
    return iter(tqdm(itertools.chain(*splits.values()), total=total, unit="image", disable=None))


def estimate_line(options: GenerateOptions, splits: dict[str, Any], journal: Journal) -> str:
    """A dry run's answer."""
    found = estimate(all_rows(splits), options, journal)
    line = f"{found.images} images left to ask: {found.requests} requests, about {found.input_tokens:.0f} input and "
    line += f"{found.output_tokens:.0f} output tokens"
    if found.usd is None:
        return f"{line}; with --price, dollars too"
    return (
        f"{line}, ${found.usd:.2f} (at most ${found.most_usd:.2f} without repairs); spent so far ${journal.spent:.2f}"
    )


def write(output: Path, splits: dict[str, Any], options: GenerateOptions, journal: Journal) -> BuildResult:
    """Write the rows that the record gives as the folder's only configuration."""
    report, kept = Report(), NearDuplicates()
    report.notes.extend(
        f"{total.replies} {kind} replies: {total.input_tokens} input and {total.output_tokens} output tokens"
        + (f", ${total.usd:.2f}" if not journal.unpriced else "")
        for kind, total in sorted(journal.totals.items())
    )
    if journal.maybe_charged:
        report.notes.append(f"requests without an answer that may have been charged: ${journal.maybe_charged:.2f}")
    with (output / REJECTED).open("w", encoding="utf-8") as file:

        def rejected(line: dict[str, Any]) -> None:
            report.quirks[f"{'pair' if 'question' in line else 'image'}: {line['reason'].partition(':')[0]}"] += 1
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

        made = {split: list(generated_rows(rows, options, journal, kept, rejected)) for split, rows in splits.items()}
    made = {split: rows for split, rows in made.items() if rows}
    sources = {row["source"] for rows in made.values() for row in rows}
    recipe = Recipe(sources={name: SourceOptions(output) for name in sorted(sources)})
    with (output / REPLIES).open("rb") as replies:
        inputs = hashlib.file_digest(replies, "sha256").hexdigest()
    return write_dataset(output, {"default": made} if made else {}, recipe, report, inputs)
