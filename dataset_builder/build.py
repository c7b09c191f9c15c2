"""A build from a recipe: read the sources, caption, split, fill the queues, write.

A build whose inputs have not changed does nothing: the digest of the recipe, of every raw file, of this package's
code and of the libraries that shape the output stands in build.json. The raw files are hashed by content, because a
copied or cloned folder has new time stamps and old bytes.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .assemble import (
    Configs,
    WrittenSplits,
    content_fingerprint,
    is_complete,
    read_build_record,
    remove_old_data,
    write_atomically,
    write_data,
)
from .captions import caption_images
from .card import dataset_card
from .dialogues import join_dialogues
from .leakage import joined_groups, leakage_json, leakage_markdown, leaking_images, overlaps
from .queue import fill_queues
from .recipe import EIGHT_ONE_ONE, OFFICIAL, Recipe, RecipeError
from .report import Report, SourceError
from .schema import CAPTION, Row
from .sources import READERS
from .sources.slake import read_boxes
from .statistics import write_statistics

SPLITS = ("train", "validation", "test")
BENCHMARKS = ("slake", "vqa_rad", "path_vqa")  # their test images are in no training split
LIBRARIES = ("bm25s", "datasets", "faiss-cpu", "ImageHash", "matplotlib", "pillow", "pyarrow")
DECODERS = ("pydicom", "python-gdcm", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pyjpegls")  # of DICOM


@dataclass(frozen=True)
class BuildResult:
    """What stands in the folder after a build: rows by configuration and split, and the report in lines."""

    output: Path
    unchanged: bool
    content: str
    rows: dict[str, dict[str, int]]
    report: list[str]


def build(recipe: Recipe, output: Path) -> BuildResult:
    """Build `recipe`'s dataset into the folder `output`, or find that nothing has changed since the last time.

    Raises SourceError for a source that cannot be read and RecipeError where `output` holds something else.
    """
    record = read_build_record(output)
    if record is None and output.exists() and any(output.iterdir()):
        raise RecipeError(f"{output}: not empty and not written by this builder; give another --output")
    inputs = inputs_digest(recipe)
    if record is not None and record.get("inputs") == inputs and is_complete(output, record):
        return BuildResult(output, True, record["content"], record["rows"], record["report"])
    report = Report()
    configs = make_configs(recipe, report)
    return write_dataset(output, configs, recipe, report, inputs)


def inputs_digest(recipe: Recipe) -> str:
    """sha256 of all that the output depends on."""
    digest = hashlib.sha256(repr((recipe.captions, recipe.queue, dict(recipe.default), recipe.dialogues)).encode())
    digest.update(repr([(name, _version(name)) for name in (*LIBRARIES, *DECODERS)]).encode())
    code = Path(__file__).parent
    _hash_files(digest, code, sorted(code.rglob("*.py")))
    for name, source in recipe.sources.items():
        if not source.data.is_dir():
            raise SourceError(f"{source.data}: no such folder; expected {name}'s raw folder")
        digest.update(repr((name, source.languages, sorted(source.own.items()))).encode())
        _hash_files(digest, source.data, sorted(path for path in source.data.rglob("*") if path.is_file()))
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None  # a decoder that is installed later reads more files


def _hash_files(digest: "hashlib._Hash", root: Path, paths: Sequence[Path]) -> None:
    for path in paths:
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())


def make_configs(recipe: Recipe, report: Report) -> Configs:
    """The rows of every configuration: `default` and `pretrain` where the recipe wants them, then one a source."""
    rows = {
        name: list(READERS[name](source.data, report, source.languages, **source.own))
        for name, source in recipe.sources.items()
    }
    every_row = [row for source_rows in rows.values() for row in source_rows]
    groups = joined_groups(every_row)
    for row in every_row:
        row["group"] = groups[row["group"]]
    pairs = [row for row in every_row if row["question_type"] == CAPTION]
    rows = {name: [row for row in members if row["question_type"] != CAPTION] for name, members in rows.items()}
    pretrain = by_split([*pairs, *_captioned(recipe, rows, report)])
    parts = {name: default_splits(rows[name], choice) for name, choice in recipe.default.items()}
    benchmarks = [row for row in every_row if row["source_split"] == "test" and row["source"] in BENCHMARKS]
    mixtures = {"default": _joined(parts.values()), "pretrain": pretrain}
    mixtures = {name: without_leaks(splits, benchmarks, report) for name, splits in mixtures.items() if splits}
    if recipe.queue is not None:
        fill_queues(every_row, _training_ids(rows, mixtures.get("default", {})), recipe.queue)
    if "default" in mixtures and recipe.dialogues:
        mixtures["default"]["train"] = join_dialogues(mixtures["default"].get("train", []), recipe.dialogues)
    return mixtures | {name: by_split(source_rows) for name, source_rows in rows.items() if source_rows}


def _captioned(recipe: Recipe, rows: Mapping[str, Sequence[Row]], report: Report) -> Iterator[Row]:
    """Caption the sources that the recipe names, and yield the pretrain rows."""
    for name in recipe.captions:
        root = recipe.sources[name].data
        yield from caption_images(rows[name], partial(read_boxes, root, report=report))


def by_split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by their official split, only splits that have any."""
    splits = {split: [row for row in rows if row["source_split"] == split] for split in SPLITS}
    return {split: members for split, members in splits.items() if members}


def default_splits(rows: Sequence[Row], choice: str | float) -> dict[str, list[Row]]:
    """A source's part of the mixture: its official splits, or its training rows divided by group.

    `choice` is "official", "8:1:1" (the paper's section 4.1) or the share that becomes validation. The group's hash
    decides, so that all rows of an image go together and adding images moves none; official validation and test rows
    then stay out of the mixture. A training row without an answer teaches nothing and stays out too.
    """
    parts = by_split(rows)
    training = [row for row in parts.get("train", []) if row["answer"]]
    if choice == OFFICIAL:
        return parts | {"train": training}
    validation, test = (0.1, 0.1) if choice == EIGHT_ONE_ONE else (float(choice), 0.0)
    divided: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in training:
        share = _hash_share(row["group"])
        split = "validation" if share < validation else "test" if share < validation + test else "train"
        divided[split].append(row)
    return {split: members for split, members in divided.items() if members}


def without_leaks(splits: dict[str, list[Row]], benchmarks: Sequence[Row], report: Report) -> dict[str, list[Row]]:
    """Drop training rows about an image that is held out or in a benchmark's test, exactly or nearly; then, of the
    validation rows, those about a test image.

    Raises SourceError if any is left.
    """
    kept = dict(splits)
    held_out = [row for split in ("test", "validation") for row in splits.get(split, [])] + list(benchmarks)
    for split, others in (("validation", [*splits.get("test", []), *benchmarks]), ("train", held_out)):
        leaking = leaking_images(kept.get(split, []), others)
        for row in kept.get(split, []):
            if row["image_sha256"] in leaking:
                report.drop(row, split, f"like the held-out image {leaking[row['image_sha256']]}")
        kept[split] = [row for row in kept.get(split, []) if row["image_sha256"] not in leaking]
        if left := leaking_images(kept[split], others):
            raise SourceError(f"{split}: {len(left)} images are held out too, such as {min(left)}; this is a defect")
    return {split: kept[split] for split in SPLITS if kept.get(split)}


def _hash_share(group: str) -> float:
    """A group's place between 0 and 1, even and unrelated to its content."""
    return int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 2**32


def _joined(parts: Iterable[dict[str, list[Row]]]) -> dict[str, list[Row]]:
    members = list(parts)
    splits = {split: [row for part in members for row in part.get(split, [])] for split in SPLITS}
    return {split: rows for split, rows in splits.items() if rows}


def _training_ids(rows: Mapping[str, Sequence[Row]], default: Mapping[str, Sequence[Row]]) -> set[str]:
    """The ids that may be learned from: the mixture's training rows, and the official ones of sources outside it."""
    mixed = {row["source"] for members in default.values() for row in members}
    outside = [row for name, members in rows.items() if name not in mixed for row in by_split(members).get("train", [])]
    return {row["id"] for row in [*default.get("train", []), *outside]}


def write_dataset(output: Path, configs: Configs, recipe: Recipe, report: Report, inputs: str) -> BuildResult:
    """Write data, card, bad_rows.jsonl and build.json, then delete an earlier build's data."""
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "build.json", "{}\n")  # until the end: ours, but not whole
    report.write_rows(output)
    if not any(rows for splits in configs.values() for rows in splits.values()):
        raise SourceError(f"{output}: no usable row in {', '.join(recipe.sources)} ({'; '.join(report.lines())})")
    content = content_fingerprint(configs)
    written = write_data(output, configs, content)
    found = overlaps(configs, mixtures=configs.keys() - recipe.sources.keys())
    write_atomically(output / "leakage.json", json.dumps(leakage_json(found), indent=1) + "\n")
    write_atomically(output / "leakage.md", leakage_markdown(found))
    write_statistics(output, configs)
    write_atomically(output / "README.md", dataset_card(written, recipe.sources, report, content))
    rows = {config: {s: files.num_examples for s, files in splits.items()} for config, splits in written.items()}
    record = {"inputs": inputs, "content": content, "rows": rows, "report": report.lines()}
    record["files"] = _file_sizes(output, written)
    write_atomically(output / "build.json", json.dumps(record, indent=1) + "\n")
    remove_old_data(output, content)
    return BuildResult(output, False, content, rows, report.lines())


def _file_sizes(output: Path, written: WrittenSplits) -> dict[str, int]:
    names = [name for splits in written.values() for files in splits.values() for name in files.files]
    return {name: (output / name).stat().st_size for name in names}
