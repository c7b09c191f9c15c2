"""Tables that people write: CSV or JSONL, one question a row, in the files of a folder; and the columns that the
sources `folder` and `dicom` read from them.

A spreadsheet saves a table with commas, semicolons or tabs, with or without a byte order mark, and with empty lines at
its end: all of these read. What cannot be read is either one error for the table (not UTF-8, no column `image`) or one
bad row (a quote that does not close, a cell too many, JSON that is cut); lines after a bad row are read.
"""

import contextlib
import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..captions import INSTRUCTIONS
from ..images import ImageFile
from ..report import BadRowError, Report, SourceError
from ..schema import CAPTION, Row
from .raw import RowMaker, optional_text, rows_of, text

Record: TypeAlias = Mapping[str, Any]

SUFFIXES = (".csv", ".tsv", ".jsonl")
DELIMITERS = ",;\t|"
COLUMNS = (
    *("image", "question", "answer", "answer_type", "question_type", "organ", "modality"),
    *("caption", "history", "split", "group"),
)
OTHER_NAMES = {"figure_path": "image"}  # RadFM's csv, whose img_root_dir is the folder given as --data
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
LONGEST_NAME = 1_000  # characters; a longer one is a quote that never closed


def find_tables(root: Path) -> list[Path]:
    """The tables in `root`, not below it, in the order of their names. SourceError if there is none."""
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder; expected images and a table of questions in it")
    tables = sorted(path for path in root.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not tables:
        raise SourceError(f"{root}: no table of questions; expected a .csv, .tsv or .jsonl file in this folder")
    return tables


def read_table(path: Path, report: Report) -> Iterator[Record | BadRowError]:
    """The rows of a table in order, names of columns in lower case; an error in the place of each that does not read.

    SourceError if the table as a whole cannot be read.
    """
    return _jsonl_records(path, report) if path.suffix.lower() == ".jsonl" else _csv_records(path, report)


def read_lines(path: Path, report: Report) -> Iterator[str]:
    """The lines of a UTF-8 file, each with its end; SourceError names the first that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise SourceError(f"{path}: is UTF-16; save it as UTF-8 (a spreadsheet calls that 'CSV UTF-8')")
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                report.quirks[f"{path.name}: byte order mark removed"] += 1
                line = line[3:]
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                found = f"byte {line[error.start]:#04x} in line {number}"
                raise SourceError(f"{path}: {found} is not UTF-8; save the file as UTF-8") from error


def _csv_records(path: Path, report: Report) -> Iterator[Record | BadRowError]:
    lines = read_lines(path, report)
    header = next(lines, "")
    columns, delimiter = _header(path, header, report)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRowError("row", str(error), "cells with closed quotes", "mend the quotes in this line")
            continue
        if not any(cell.strip() for cell in cells):
            report.quirks[f"{path.name}: empty line left out"] += 1
        elif len(cells) != len(columns):
            found = f"{len(cells)} cells"
            yield BadRowError("row", found, f"{len(columns)} cells, as in the first line", "quote text with commas")
        else:
            yield dict(zip(columns, cells, strict=True))


def _header(path: Path, line: str, report: Report) -> tuple[list[str], str]:
    """The names of the columns, and the delimiter that gives the most names that are known."""
    readings = {delimiter: _names(next(csv.reader([line], delimiter=delimiter), [])) for delimiter in DELIMITERS}
    delimiter = max(DELIMITERS, key=lambda mark: len(set(readings[mark]) & set(COLUMNS)))
    columns = readings[delimiter]
    if "image" not in columns or not {"question", "caption"} & set(columns):
        raise SourceError(
            f"{path}: no columns `image` and `question` (or `caption`) in the first line, which reads {line[:80]!r}; "
            "expected their names, with commas, semicolons, tabs or bars between"
        )
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise SourceError(f"{path}: columns {twice} come twice in the first line; give each column its own name")
    unread = sorted(set(columns) - set(COLUMNS))
    if unread:
        report.notes.append(f"{path.name}: columns {', '.join(unread)} are not read")
    return columns, delimiter


def _names(cells: Sequence[str]) -> list[str]:
    names = [cell.strip().lower() for cell in cells]
    return [OTHER_NAMES.get(name, name) for name in names]


def _jsonl_records(path: Path, report: Report) -> Iterator[Record | BadRowError]:
    for line in read_lines(path, report):
        if not line.strip():
            report.quirks[f"{path.name}: empty line left out"] += 1
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield BadRowError("row", str(error), "one JSON object in this line", "mend the line")
            continue
        if isinstance(record, dict):
            yield dict(zip(_names(list(record)), record.values(), strict=True))
        else:
            yield BadRowError("row", type(record).__name__, "a JSON object with named fields", "mend the line")


def make_rows(
    source: str,
    path: Path,
    report: Report,
    records: Iterable[Record | BadRowError],
    make_row: RowMaker,
    seen_ids: set[str],
) -> Iterator[Row]:
    """The rows of a table, whose ids follow from their content; see `rows_of`."""
    numbered = enumerate(records)
    yield from rows_of(source, path, numbered, report, lambda _, record: make_row(record), seen_ids, id_field=None)


def file_name(record: Record, field: str, report: Report) -> str:
    """A name relative to the source's folder, with "/" between folders; BadRowError if it can be none."""
    name = os.path.normpath(text(record, field, report).replace("\\", "/"))
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise BadRowError(field, name[:80], "the name of a file", "mend the row in the table")
    return name


def row_columns(record: Record, image: ImageFile, table: Path, languages: Sequence[str], report: Report) -> Row:
    """The columns of the schema that a table's row gives, without those of the image. BadRowError if one cannot be
    used.

    A row without a question but with a caption becomes a row to pretrain on: an instruction and the caption. `split`
    is, where the row has none, the table's own name if that is a split (val.csv), else train.
    """
    caption = optional_text(record, "caption", report)
    if optional_text(record, "question", report) is None:
        if caption is None:
            raise BadRowError("question", record.get("question"), "a question, or a caption", "mend the row")
        words: Row = caption_pair(caption, image)
    else:
        words = {"question": text(record, "question", report), "answer": text(record, "answer", report)}
        words["question_type"] = optional_text(record, "question_type", report)
    return words | {
        "caption": caption,
        "history": history(record, report),
        "answer_type": answer_type(record),
        "organ": optional_text(record, "organ", report),
        "modality": optional_text(record, "modality", report),
        "language": languages[0] if len(languages) == 1 else None,
        "source_split": split(record, table),
    }


def caption_pair(caption: str, image: ImageFile) -> Row:
    """Question and answer of a row to pretrain on, marked as such by its question type; the image picks the wording."""
    wordings = INSTRUCTIONS["caption"]
    question = wordings[int(image.sha256[:8], 16) % len(wordings)]
    return {"question": question, "answer": caption, "question_type": CAPTION}


def row_id(source: str, row: Row) -> str:
    """Source and hash of image, split and words: the same wherever in the tables the row stands."""
    parts = [row["image_sha256"], row["source_split"], row["question"], row["answer"], row["history"]]
    return f"{source}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]}"


def answer_type(record: Record) -> str | None:
    """ "open", "closed" or None; BadRowError for anything else."""
    label = str(record.get("answer_type") or "").strip().lower()
    if label not in ("open", "closed", ""):
        raise BadRowError("answer_type", record["answer_type"], "open, closed or nothing", "mend the row")
    return label or None


def split(record: Record, table: Path) -> str:
    """train, validation or test; BadRowError for a split of any other name."""
    name = str(record.get("split") or "").strip().lower()
    if not name:
        return SPLITS.get(table.stem.lower(), "train")
    if name not in SPLITS:
        raise BadRowError("split", record["split"], "train, validation or test", "mend the row in the table")
    return SPLITS[name]


def history(record: Record, report: Report) -> list[dict[str, str]]:
    """The earlier turns: a list of {role, content}, in a CSV cell as JSON. BadRowError if it is anything else."""
    turns: Any = record.get("history") or []
    if isinstance(turns, str):
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON stays a text, refused below
            turns = json.loads(turns)
    known = isinstance(turns, list) and all(
        isinstance(turn, dict) and turn.get("role") in ("user", "assistant") for turn in turns
    )
    if not known:
        expected = 'a list such as [{"role": "user", "content": "..."}]'
        raise BadRowError("history", record["history"], expected, "mend the row")
    return [{"role": turn["role"], "content": text(turn, "content", report)} for turn in turns]


class Groups:
    """What must stay on one side of a split: all images of one patient or study, by the hash of the first of them.

    The patient's own name or number is not in the group, nor hashed into it. A number of few digits can be found
    again from its hash by trying all; a random salt would keep it but give other bytes at every build. The first
    image's sha256 does neither, and tells no more than the dataset shows anyway: which images belong together.
    """

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def of(self, key: str | None, image: ImageFile) -> str:
        """The group of an image that belongs to `key` (patient or study; None: the image stands alone)."""
        return image.sha256 if key is None else self._first.setdefault(key, image.sha256)

    def __len__(self) -> int:
        return len(self._first)


def note_unused(source: str, root: Path, used: set[str], report: Report) -> None:
    """Count the files under `root` that no row asks about; tables and hidden files are none of them."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    unused = [
        path for path in files if path.suffix.lower() not in SUFFIXES and path.relative_to(root).as_posix() not in used
    ]
    if unused:
        report.quirks[f"{source}: file that no row asks about"] += len(unused)
