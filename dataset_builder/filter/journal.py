"""Append-only JSON lines that outlive a kill: a line is on disk before the next begins, and a torn last one is cut."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; [] where there is no file. ValueError for a line that is no JSON object."""
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):  # after the last newline: nothing, or torn
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error}); mend or delete the line") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}: line {number} is a {type(record).__name__}, expected an object; mend the line")
        records.append(record)
    return records


class Journal:
    """A file of JSON lines to append to; `records` is what stood in it when it was opened."""

    def __init__(self, path: Path) -> None:
        """Create the file, or cut off the line that a killed writer left unfinished."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records = read_lines(path)
        self._stream = path.open("ab")
        data = path.read_bytes()
        self._stream.truncate(data.rfind(b"\n") + 1)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append the records and wait until the disk has them."""
        self._stream.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
