"""Rows to a folder that `load_dataset` opens: Parquet under data/<content>/, a card that names them, build.json.

The folder's name holds a fingerprint of the rows because of a trap in `datasets`: where the card names the files, its
cache key is a hash of the card alone, so a rebuilt file of the same name would silently be answered from the old
cache. A new fingerprint is a new card. Images are written once per row group: many rows ask about one image, and
dictionary encoding keeps repeated bytes once. Everything is written aside and renamed; the card comes last, so a
build that is killed leaves the old dataset whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from .schema import FEATURES, Row

Configs: TypeAlias = Mapping[str, Mapping[str, Sequence[Row]]]  # configuration -> split -> rows

ROWS_PER_GROUP = 1_000
ROWS_PER_SHARD = 50_000
DICTIONARY_BYTES = 256 * 2**20  # above this a row group's images are stored row by row


@dataclass(frozen=True)
class SplitFiles:
    """What was written for one split: its rows, their size as Arrow and as Parquet in bytes, its files in order."""

    num_examples: int
    num_bytes: int
    download_bytes: int
    files: tuple[str, ...]  # relative to the dataset's folder


WrittenSplits: TypeAlias = dict[str, dict[str, SplitFiles]]


def content_fingerprint(configs: Configs) -> str:
    """16 hexadecimal digits of all rows' content, an image counted by its sha256; the order of rows counts too."""
    digest = hashlib.sha256(repr(FEATURES).encode())
    for config, splits in configs.items():
        for split, rows in splits.items():
            digest.update(f"\n{config}/{split}\n".encode())
            for row in rows:
                digest.update(json.dumps(row | {"image": None}, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def write_data(output: Path, configs: Configs, fingerprint: str) -> WrittenSplits:
    """Write every split under output/data/<fingerprint>/<configuration>/ and return what lies there."""
    data = output / "data"
    partial, final = data / f"partial-{fingerprint}", data / fingerprint
    for leftover in (partial, data / f"replaced-{fingerprint}"):  # of a build that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    written: WrittenSplits = {
        config: {split: _write_split(partial / config, split, rows) for split, rows in splits.items()}
        for config, splits in configs.items()
    }
    if final.exists():  # the same rows written again: the old files make room at once, and go with remove_old_data
        final.rename(data / f"replaced-{fingerprint}")
    partial.rename(final)
    return {
        config: {split: _moved(files, f"data/{fingerprint}/{config}") for split, files in splits.items()}
        for config, splits in written.items()
    }


def _moved(files: SplitFiles, folder: str) -> SplitFiles:
    names = tuple(f"{folder}/{name}" for name in files.files)
    return SplitFiles(files.num_examples, files.num_bytes, files.download_bytes, names)


def _write_split(folder: Path, split: str, rows: Sequence[Row]) -> SplitFiles:
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes, names = 0, []
    for shard, start in enumerate(range(0, len(rows), ROWS_PER_SHARD)):
        names.append(f"{split}-{shard:05d}.parquet")
        num_bytes += _write_shard(folder / names[-1], rows[start : start + ROWS_PER_SHARD])
    return SplitFiles(len(rows), num_bytes, sum((folder / name).stat().st_size for name in names), tuple(names))


def _write_shard(path: Path, rows: Sequence[Row]) -> int:
    """Write one file and return its rows' size as Arrow, in bytes."""
    schema = FEATURES.arrow_schema
    num_bytes = 0
    with pq.ParquetWriter(path, schema, dictionary_pagesize_limit=DICTIONARY_BYTES) as writer:
        for table in _tables(rows, schema):
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
            num_bytes += table.nbytes
    return num_bytes


def _tables(rows: Sequence[Row], schema: pa.Schema) -> Iterator[pa.Table]:
    for start in range(0, len(rows), ROWS_PER_GROUP):
        yield pa.Table.from_pylist(list(rows[start : start + ROWS_PER_GROUP]), schema=schema)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that at every moment the old or the new content is there whole."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_build_record(output: Path) -> dict[str, Any] | None:
    """build.json of an earlier build, {} if that build did not end, None if there was none."""
    path = output / "build.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def is_complete(output: Path, record: Mapping[str, Any]) -> bool:
    """Whether an earlier build came to its end, and the card and every data file are there, with the sizes that it
    recorded.
    """
    paths = {output / name: size for name, size in record.get("files", {}).items()}
    return (
        bool(paths)
        and (output / "README.md").is_file()
        and all(p.is_file() and p.stat().st_size == n for p, n in paths.items())
    )


def remove_old_data(output: Path, fingerprint: str) -> None:
    """Delete what earlier builds left under data/."""
    for folder in (output / "data").iterdir():
        if folder.name != fingerprint:
            shutil.rmtree(folder)
