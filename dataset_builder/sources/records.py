"""Numbered records out of CSV, JSON-lines and JSON-list files that do not fit into memory, and a lookup table on disk.

A record that cannot be read goes into the report and the ones after it are read on: a quote that is never closed does
not swallow the rest of a CSV file, and of a JSON list that is cut in the middle all records before the cut come out.
Bytes that are not UTF-8 come through as lone surrogates, which `raw.text` refuses in the fields that matter. Only a
file without any record that can be read is an error.
"""

import csv
import json
import re
import sqlite3
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from ..report import BadRowError, Report, SourceError

Records: TypeAlias = Iterator[tuple[int, Any]]  # (0-based position in the file, record)

CHUNK_CHARACTERS = 2**20
LONGEST_RECORD = 2**24  # characters; a JSON record that does not end within them is broken
BLANKS_AND_COMMAS = re.compile(r"[\s,]*")
MEND = "mend the row in the file"


def read_csv(source: str, path: Path, report: Report, columns: Sequence[str]) -> Records:
    """The records below a CSV file's header as {column: text}. Blank lines do not count.

    Raises SourceError if the file has no header with `columns`, or no record that can be read.
    """
    with _open(path, newline="") as file:
        lines = _Lines(file)
        rows = csv.reader(lines, strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
        except csv.Error as error:
            raise SourceError(f"{path}: its first line is no CSV header ({error}); fetch the file again") from error
        missing = [name for name in columns if name not in header]
        if missing:
            raise SourceError(f"{path}: columns {missing} missing, the header has {header}; fetch the file again")
        yield from _some(path, _csv_records(source, path, report, lines, rows, header))


def _csv_records(
    source: str, path: Path, report: Report, lines: "_Lines", rows: Iterator[list[str]], header: list[str]
) -> Records:
    number = 0
    while True:
        lines.taken.clear()
        fields, problem = _fields(rows)
        if fields is None:
            return
        if not (fields or problem):
            continue
        if not problem and len(fields) != len(header):
            problem = f"found {len(fields)}"
        if problem:
            first = lines.put_back_all_but_first()
            report.skip(source, path, number, BadRowError("row", first, f"{len(header)} fields ({problem})", MEND))
        else:
            yield number, dict(zip(header, fields, strict=True))
        number += 1


def _fields(rows: Iterator[list[str]]) -> tuple[list[str] | None, str]:
    """The next record's fields, none of them where it is broken, None at the end; and what is wrong with it."""
    try:
        return next(rows, None), ""
    except csv.Error as error:
        return [], str(error)


class _Lines:
    """A file's lines for a CSV reader, of which those that a broken record took too many can be read once more."""

    def __init__(self, file: TextIO) -> None:
        self.taken: list[str] = []
        self._file, self._again = file, deque[str]()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.taken.append(self._again.popleft() if self._again else next(self._file))
        return self.taken[-1]

    def put_back_all_but_first(self) -> str:
        """The first line taken since `taken` was cleared; the others come again."""
        self._again.extendleft(reversed(self.taken[1:]))
        return self.taken[0]


def read_jsonl(source: str, path: Path, report: Report) -> Records:
    """The records of a file with one JSON value a line. Blank lines do not count."""

    def records() -> Records:
        with _open(path) as file:
            for number, line in enumerate(line for line in file if line.strip()):
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    report.skip(source, path, number, BadRowError("row", line, f"one JSON value ({error})", MEND))

    yield from _some(path, records())


def read_long_json_list(source: str, path: Path, report: Report) -> Records:
    """The records of a file that holds one JSON list, a piece of the file in memory at a time."""
    with _open(path) as file:
        yield from _some(path, _list_records(source, path, report, file))


def _list_records(source: str, path: Path, report: Report, file: TextIO) -> Records:
    decoder = json.JSONDecoder()
    text = file.read(CHUNK_CHARACTERS).lstrip()
    if not text.startswith("["):
        raise SourceError(f"{path}: starts with {text[:20]!r}, expected one JSON list of rows; fetch the file again")
    number, position, problem = 0, 1, "the list has no end"
    while True:
        position = _skip(text, position)
        if text.startswith("]", position):
            return
        try:
            record, end = decoder.raw_decode(text, position)
            whole = isinstance(record, dict) or end < len(text)  # else 12 may be the beginning of 123
        except (ValueError, RecursionError) as error:
            whole, problem = False, str(error)
        if whole:
            yield number, record
            number, position = number + 1, end
            continue
        more = file.read(CHUNK_CHARACTERS)
        if not more or len(text) - position > LONGEST_RECORD:
            break
        text, position = text[position:] + more, 0
    wanted = f"the rest of the list ({problem})"
    report.skip(source, path, number, BadRowError("row", text[position:][:80], wanted, "fetch the file again"))


def _skip(text: str, position: int) -> int:
    """The next position in a list that holds neither blank nor comma."""
    match = BLANKS_AND_COMMAS.match(text, position)
    return match.end() if match else position


def _open(path: Path, newline: str | None = None) -> TextIO:
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _some(path: Path, records: Records) -> Records:
    """The records; SourceError at the end if there was none."""
    nothing = True
    for record in records:
        nothing = False
        yield record
    if nothing:
        raise SourceError(f"{path}: no row of it can be read; fetch the file again")


class Lookup:
    """(name, text) pairs by key, in a temporary file of SQLite's: for tables that do not fit into memory."""

    def __init__(self, entries: Iterable[tuple[str, str, str]]) -> None:
        """`entries` are (key, name, text)."""
        self._table = sqlite3.connect("")
        self._table.execute("CREATE TABLE entries (key TEXT, name TEXT, text TEXT)")
        self._table.executemany("INSERT INTO entries VALUES (?, ?, ?)", entries)
        self._table.execute("CREATE INDEX by_key ON entries (key)")

    def find(self, key: str) -> list[tuple[str, str]]:
        """All pairs under a key, in the order in which they came."""
        return self._table.execute("SELECT name, text FROM entries WHERE key = ? ORDER BY rowid", (key,)).fetchall()
