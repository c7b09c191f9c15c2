"""What a build met on its way: quirks that were mended, rows that were skipped, split files that are not there.

Nothing is dropped silently: a skipped row is a line of bad_rows.jsonl that says which file, row and field, what was
expected, and what to do; a mended quirk is counted under a sentence that a person can read.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class SourceError(ValueError):
    """A source that cannot be read at all, in one line."""


class BadRowError(ValueError):
    """One row that cannot be used: which field, what stands there, what should stand there, what to do."""

    def __init__(self, field: str, found: Any, expected: str, what_to_do: str) -> None:
        super().__init__(f"{field}: found {found!r}, expected {expected}; {what_to_do}")
        self.field, self.found, self.expected, self.what_to_do = field, found, expected, what_to_do


@dataclass
class Report:
    """Counts and skipped rows of one build; a source's reader fills it while its rows are drawn."""

    quirks: Counter[str] = field(default_factory=Counter)
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def skip(self, source: str, file: Path, row: int | None, error: BadRowError) -> None:
        """Record a skipped row: its 0-based position in `file`, or None where the file holds no list of rows."""
        self.bad_rows.append(
            {
                "source": source,
                "file": file.name if row is not None else f"{file.parent.name}/{file.name}",
                "row": row,
                "field": error.field,
                "found": repr(error.found)[:200],
                "expected": error.expected,
                "what_to_do": error.what_to_do,
            }
        )

    def drop(self, row: Mapping[str, Any], split: str, reason: str) -> None:
        """Record a sound row that a split must not hold."""
        record = {name: row[name] for name in ("id", "source", "source_split", "image_id")}
        self.dropped.append({**record, "split": split, "reason": reason})

    def write_rows(self, folder: Path) -> None:
        """Write bad_rows.jsonl and dropped_rows.jsonl, a line a row; an empty file says that there was none."""
        for name, rows in (("bad_rows.jsonl", self.bad_rows), ("dropped_rows.jsonl", self.dropped)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (folder / name).write_text("".join(lines), encoding="utf-8")

    def lines(self) -> list[str]:
        """The report for the terminal and the dataset card, most frequent quirk first."""
        counted = [f"{count} x {quirk}" for quirk, count in self.quirks.most_common()]
        bad = [f"{len(self.bad_rows)} rows skipped, listed in bad_rows.jsonl"] if self.bad_rows else []
        dropped = [
            f"{count} {split} rows dropped, their images being held out elsewhere (dropped_rows.jsonl)"
            for split, count in Counter(row["split"] for row in self.dropped).items()
        ]
        return [*self.notes, *counted, *bad, *dropped]
