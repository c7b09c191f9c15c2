"""The record of everything that was asked: replies.jsonl, append-only, so that no answer is paid for twice.

Three kinds of line. `sent` is written before a request leaves, with the most that it can cost; `reply` holds an
answer with the server's body as it came, and is on the disk (fsync) before anything relies on it; `error` says that a
request came to nothing. A process that is killed leaves at worst a `sent` without an end, whose cost then counts in
full because nobody knows, and half a line, which is skipped. Memory: about 200 bytes a reply, for where it stands in
the file.
"""

import asyncio
import fcntl
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class GenerateError(ValueError):
    """What stops the step as a whole, in one line."""


@dataclass
class Total:
    """Sums over the replies of one kind (generate, repair, blind)."""

    replies: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0


class Journal:
    """replies.jsonl: what stands in it and, opened with `write`, what comes to it; leaving `with` closes it."""

    def __init__(self, path: Path, secrets: tuple[str, ...] = (), *, write: bool = False) -> None:
        """`secrets` are blotted out of every line, whoever put them there: a server may echo a key in an error.

        GenerateError if another process is writing the file.
        """
        self.path, self._secrets = path, secrets
        self.totals: defaultdict[str, Total] = defaultdict(Total)
        self.maybe_charged = 0.0  # dollars of requests that ended without an answer and may have been charged
        self.unpriced = 0  # replies that were recorded without a price
        self.skipped_lines = 0
        self._offsets: dict[str, int] = {}
        self._in_flight: dict[str, float] = {}
        self._written = self._synced = 0
        self._sync_lock = asyncio.Lock()
        self._file = _locked(path) if write else None  # first, so that what is read next is all there is
        if path.exists():
            self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def spent(self) -> float:
        """Dollars so far: what replies cost, and the most that requests without an answer may have cost."""
        return sum(total.usd for total in self.totals.values()) + self.maybe_charged + sum(self._in_flight.values())

    def reply(self, key: str) -> dict[str, Any] | None:
        """The line of the recorded reply to a request (`body`, `model`, `created` and so on), None if there is none."""
        if key not in self._offsets:
            return None
        with self.path.open("rb") as file:
            file.seek(self._offsets[key])
            record: dict[str, Any] = json.loads(file.readline())
        return record

    def sent(self, key: str, kind: str, row: str, most_usd: float | None) -> None:
        """A request leaves now and costs at most that."""
        self._append({"event": "sent", "key": key, "kind": kind, "row": row, "usd": most_usd})

    async def answered(self, key: str, kind: str, row: str, **columns: Any) -> None:
        """Record a reply; returns when it is on the disk. Several replies may share one fsync."""
        self._append({"event": "reply", "key": key, "kind": kind, "row": row, "created": now(), **columns})
        number = self._written
        async with self._sync_lock:
            if self._synced < number:
                covered = self._written
                assert self._file is not None
                await asyncio.to_thread(os.fsync, self._file.fileno())
                self._synced = covered

    def failed(self, key: str, kind: str, row: str, error: str, usd: float | None) -> None:
        """A request ended without an answer and may have cost `usd`."""
        self._append({"event": "error", "key": key, "kind": kind, "row": row, "error": error, "usd": usd})

    def without_secrets(self, text: str) -> str:
        """`text` with every secret blotted out."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _append(self, record: dict[str, Any]) -> None:
        assert self._file is not None, "opened only to read"
        line = self.without_secrets(json.dumps(record, ensure_ascii=False)) + "\n"
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(line.encode())
        self._file.flush()
        self._written += 1
        self._count(record, offset)

    def _read(self) -> None:
        offset, line = 0, b"\n"
        with self.path.open("rb") as file:
            for line in file:
                try:
                    self._count(json.loads(line), offset)
                except (ValueError, KeyError, TypeError):  # half a line of a process that was killed
                    self.skipped_lines += 1
                offset += len(line)
        if self._file is not None and not line.endswith(b"\n"):
            self._file.write(b"\n")

    def _count(self, record: dict[str, Any], offset: int) -> None:
        """Take one line into the sums and the index."""
        event, key, usd = record["event"], record["key"], record["usd"]
        if event == "sent":  # an earlier one without an end was under way when its process was killed
            self.maybe_charged += self._in_flight.pop(key, 0.0)
            self._in_flight[key] = usd or 0.0
            return
        self._in_flight.pop(key, None)
        if event == "error":
            self.maybe_charged += usd or 0.0
            return
        total = self.totals[record["kind"]]
        total.replies += 1
        total.input_tokens += record["input_tokens"] or 0
        total.output_tokens += record["output_tokens"] or 0
        total.usd += usd or 0.0
        self.unpriced += usd is None
        self._offsets[key] = offset


def _locked(path: Path) -> BufferedWriter:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise GenerateError(f"{path}: another process is writing it; wait for its end") from error
    return file


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
