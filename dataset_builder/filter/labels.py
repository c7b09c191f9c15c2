"""Hand labels: one JSON line a decision {image_sha256, label, annotator, time}.

Nothing is overwritten: who goes back and decides otherwise adds a line, and the last line of an annotator counts. A
figure goes into training with the label that more than half of its annotators gave it; where there is none, or it is
"unsure", the figure is left out.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from .journal import Journal, read_lines
from .measures import kappa, with_interval

LABELS = ("clean", "polluted", "unsure")

Labels = dict[str, dict[str, str]]  # annotator -> image_sha256 -> label


def read_labels(path: Path) -> Labels:
    """Every annotator's last word on each figure. ValueError where there are none, or a line is not a label."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; label figures with `biod2c build annotate` first")
    return _last_words(path, read_lines(path))


def _last_words(path: Path, records: Iterable[dict[str, Any]]) -> Labels:
    labels: Labels = defaultdict(dict)
    for number, record in enumerate(records, 1):
        known = all(isinstance(record.get(field), str) for field in ("image_sha256", "annotator"))
        if not known or record.get("label") not in LABELS:
            raise ValueError(
                f"{path}: line {number}: expected image_sha256, annotator and a label among {LABELS}; mend the line"
            )
        labels[record["annotator"]][record["image_sha256"]] = record["label"]
    return labels


def agreed(labels: Labels) -> tuple[dict[str, str], Counter[str]]:
    """{image_sha256: "clean" or "polluted"} by majority, and how many figures are "unsure" or "disagreed" instead."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for words in labels.values():
        for sha, label in words.items():
            votes[sha][label] += 1
    decided, left_out = {}, Counter[str]()
    for sha, counts in votes.items():
        label, count = counts.most_common(1)[0]
        if 2 * count <= counts.total():
            left_out["disagreed"] += 1
        elif label == "unsure":
            left_out["unsure"] += 1
        else:
            decided[sha] = label
    return decided, left_out


def agreement(labels: Labels) -> list[dict[str, Any]]:
    """For each two annotators who saw the same figures: `figures`, `kappa`, `interval` and their `disagreements`.

    ValueError where no two did.
    """
    pairs = []
    for one, other in itertools.combinations(sorted(labels), 2):
        if both := sorted(labels[one].keys() & labels[other].keys()):
            first, second = ([labels[name][sha] for sha in both] for name in (one, other))
            estimate = with_interval(partial(kappa, first, second), both)
            rows = zip(both, first, second, strict=True)
            pairs.append(
                {
                    "annotators": (one, other),
                    "figures": len(both),
                    "kappa": estimate["value"],
                    "interval": estimate["interval"],
                    "disagreements": [row for row in rows if row[1] != row[2]],
                }
            )
    if not pairs:
        raise ValueError(f"annotators {sorted(labels)}: no two labelled the same figures; have a second one annotate")
    return pairs


def seeded_order(shas: Iterable[str], seed: int) -> list[str]:
    """The figures in an order that depends on the seed and on nothing else: the same for every annotator."""
    return sorted(shas, key=lambda sha: hashlib.sha256(f"{seed} {sha}".encode()).digest())


class Session:
    """One annotator's way through the figures, kept apart from the page that shows it.

    Opening it again goes on at the first figure without a label. It never shows what others said.
    """

    def __init__(self, order: list[str], path: Path, annotator: str) -> None:
        self.order, self.annotator = order, annotator
        self._journal = Journal(path)
        self.labels = dict(_last_words(path, self._journal.records).get(annotator, {}))
        self._position = self._next_unlabelled(0)

    @property
    def current(self) -> str | None:
        """The figure to show; None when all have a label."""
        return self.order[self._position] if self._position < len(self.order) else None

    @property
    def done(self) -> int:
        """How many of the figures have a label."""
        return sum(sha in self.labels for sha in self.order)

    def label(self, sha: str, label: str) -> None:
        """Record a label and go on to the next figure without one.

        `sha` is the figure that the annotator saw: where it is not the current one (a key pressed twice), nothing
        happens.
        """
        if label not in LABELS:
            raise ValueError(f"label {label!r}: expected one of {LABELS}")
        if sha != self.current:
            return
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._journal.append([{"image_sha256": sha, "label": label, "annotator": self.annotator, "time": time}])
        self.labels[sha] = label
        self._position = self._next_unlabelled(self._position)

    def back(self) -> None:
        """Show the figure before this one again, with the label it has."""
        self._position = max(0, self._position - 1)

    def _next_unlabelled(self, start: int) -> int:
        """The first figure without a label from `start` on, else from the beginning, else the end."""
        places = itertools.chain(range(start, len(self.order)), range(start))
        return next((place for place in places if self.order[place] not in self.labels), len(self.order))
