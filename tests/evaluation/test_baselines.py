"""Blind baselines: a hand-made table, and the figures known for SLAKE's English validation split."""

import json
from pathlib import Path

import pytest

from biod2c.evaluation import majority, question_only, score

SLAKE = Path(__file__).parents[2] / "examples" / "slake"


def row(question: str, answer: str, answer_type: str | None) -> dict[str, str | None]:
    return {"question": question, "answer": answer, "answer_type": answer_type}


TRAIN = [
    row("Is the lung healthy?", "No", "closed"),
    row("Is the lung healthy?", "Yes", "closed"),
    row("is the lung healthy", "yes.", "closed"),
    row("What organ is this?", "Liver", "open"),
    row("What organ is bright?", "Lung", "open"),
    row("What organ is dark?", "Lung", "open"),
    row("What organ is larger, liver or lung?", "Lung", "closed"),
]


@pytest.mark.parametrize(
    ("question", "answer_type", "expected"),
    [
        ("IS THE LUNG HEALTHY?", "closed", "Yes"),  # the same question: "yes" twice, spelled as first met
        ("What organ is this?", "open", "Liver"),  # the same question beats its beginning
        ("What organ is shown?", "open", "Lung"),  # by its first three words and type
        ("Where is it?", "closed", "Yes"),  # new: the majority of its type
        ("Where is it?", "open", "Lung"),
        ("Where is it?", None, "Lung"),  # no label: the majority of all
    ],
)
def test_question_only(question: str, answer_type: str | None, expected: str) -> None:
    assert question_only(TRAIN, [row(question, "never read", answer_type)]) == [expected]


def test_majority_per_type() -> None:
    rows = [row("Where?", "never read", answer_type) for answer_type in ("closed", "open", None)]
    assert majority(TRAIN, rows) == ["Yes", "Lung", "Lung"]


def test_ties_go_to_the_first_answer() -> None:
    tied = [row("Side?", "Left", "open"), row("Side?", "Right", "open")]
    assert question_only(tied, tied) == majority(tied, tied) == ["Left", "Left"]


def test_no_training_rows() -> None:
    with pytest.raises(ValueError, match="at least one training row"):
        majority([], [])


def test_slake_english_validation() -> None:
    def read(name: str) -> list[dict[str, str]]:
        return [line for line in json.loads((SLAKE / name).read_text(encoding="utf-8")) if line["q_lang"] == "en"]

    train, rows = read("train.json"), read("validate.json")
    answers, types = [line["answer"] for line in rows], [line["answer_type"] for line in rows]
    scores = score(question_only(train, rows), answers, types)
    known = {"closed_acc": 0.652, "open_acc": 0.520, "accuracy": 0.573}
    assert {name: scores[name] for name in known} == pytest.approx(known, abs=0.002)
