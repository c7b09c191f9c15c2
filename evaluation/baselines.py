"""What can be scored without looking at the image: the floor under every model.

94 % of SLAKE's English test questions stand word for word in its training split, so a table from question to answer
reaches over half of the points. A model that sees has to beat it, and every report prints by how much.
Ties go to the answer met first in the training split. The answer type is used only where the source labels it:
told from the answer it would leak it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from .metrics import labelled_type, normalize

Row = Mapping[str, Any]
Keys = Callable[[Row], list[Hashable]]


def majority(train: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """For each of `rows` the commonest training answer of its answer type; of all types where it has no label.

    Rows are mappings with question, answer and answer_type. An empty training split raises ValueError.
    """
    return _commonest_answers(train, rows, _majority_keys)


def question_only(train: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """For each of `rows` the commonest training answer to the same question, else by its first three words and type.

    Where those are new too, the majority answer. An empty training split raises ValueError.
    """
    return _commonest_answers(train, rows, _question_keys)


def _majority_keys(row: Row) -> list[Hashable]:
    return [("type", labelled_type(row["answer_type"])), ("all",)]


def _question_keys(row: Row) -> list[Hashable]:
    question = normalize(row["question"])
    beginning = tuple(question.split()[:3])
    return [
        ("question", question),
        ("beginning", beginning, labelled_type(row["answer_type"])),
        *_majority_keys(row),
    ]


def _commonest_answers(train: Sequence[Row], rows: Sequence[Row], keys: Keys) -> list[str]:
    """Count the training answers under each row's keys; answer by the first key, fine to coarse, that has any."""
    if not train:
        raise ValueError("a baseline needs at least one training row")
    counts: dict[Hashable, Counter[str]] = defaultdict(Counter)
    spelling: dict[str, str] = {}
    for row in train:
        answer = normalize(row["answer"])
        spelling.setdefault(answer, row["answer"])
        for key in keys(row):
            counts[key][answer] += 1
    known = ([key for key in keys(row) if key in counts] for row in rows)
    return [spelling[counts[first].most_common(1)[0][0]] for first, *_ in known]
