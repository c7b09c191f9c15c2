"""Metric values against hand-worked cases and against formulas written here or in other libraries."""

from collections import Counter

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from biod2c.evaluation import answer_kind, is_correct, normalize, score
from biod2c.evaluation.metrics import labelled_type, measure, summarize

WORDS = st.lists(st.sampled_from(["lung", "left", "the", "two", "no", "heart"]), max_size=5).map(" ".join)
PAIRS = st.lists(st.tuples(WORDS, WORDS.filter(bool)), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("answer", "prediction", "correct"),
    [
        ("no", "normal", False),
        ("Liver", "the liver.", True),
        ("Left Lung", "lung", False),
        ("2", "two", True),
        ("Yes", "", False),
        ("Yes", "yes", True),
        ("T2", "t2 ", True),
        ("Right Lung, Lower Left", "right lung lower left", True),
        ("5.6-cm", "5.6 cm", True),
        ("5.6 cm", "56 cm", False),
        ("1,000", "1000", True),
        ("Crohn's disease", "crohns disease", True),
        ("x-ray", "X ray", True),
        ("A", "a", True),
        ("?", "!", False),
    ],
)
def test_strict_by_hand(answer: str, prediction: str, correct: bool) -> None:
    assert is_correct(prediction, answer) is correct


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The\tLeft\nlung. ", "left lung"),
        ("Twelve nodules", "12 nodules"),
        ("ｆｕｌｌ－ｗｉｄｔｈ", "full width"),
        ("肺部，右侧", "肺部 右侧"),
        ("none", "none"),
        ("...", ""),
    ],
)
def test_normalize_by_hand(text: str, normal: str) -> None:
    assert normalize(text) == normal


@given(st.text())
def test_normalize_twice_changes_nothing(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@given(WORDS)
def test_case_articles_and_punctuation_do_not_matter(text: str) -> None:
    assert normalize(f"The {text.upper()}!") == normalize(f"the {text}")


def test_closed_and_open() -> None:
    assert answer_kind("Lung", "CLOSED ") == "closed"  # VQA-RAD's trailing blank, SLAKE's closed non-yes/no
    assert answer_kind("yes", "open") == "open"
    assert answer_kind("No.") == "closed"
    assert answer_kind("Lung") == "open"
    assert labelled_type("") is None
    with pytest.raises(ValueError, match="'multi' is neither"):
        labelled_type("multi")


def test_score_by_hand() -> None:
    scores = score(["yes", "no", "lung", ""], ["Yes", "Yes", "Left Lung", "Liver"], ["closed", "closed", "open", None])
    assert scores["closed_acc"] == 0.5
    assert scores["open_acc"] == 0.0
    assert scores["accuracy"] == 0.25
    assert scores["rouge1"] == pytest.approx((1 + 0 + 2 / 3 + 0) / 4)


def test_empty_predictions_are_counted() -> None:
    full, half = score(["liver"], ["liver"]), score(["liver", ""], ["liver", "liver"])
    assert (full["accuracy"], half["accuracy"]) == (1, 0.5)
    assert (full["rouge1"], half["rouge1"]) == (1, 0.5)
    assert half["bleu1"] == pytest.approx(np.exp(-1))  # precision 1, two reference words for one predicted
    assert score([""], ["liver"])["bleu1"] == 0


@given(PAIRS)
def test_bleu_is_sacrebleus_corpus_score(pairs: list[tuple[str, str]]) -> None:
    predictions, answers = map(list, zip(*pairs, strict=True))
    corpus = sacrebleu.metrics.BLEU(max_ngram_order=1).corpus_score(predictions, [answers])
    assert score(predictions, answers)["bleu1"] == pytest.approx(corpus.score / 100)


@given(PAIRS)
def test_rouge_is_unigram_f1(pairs: list[tuple[str, str]]) -> None:
    def f1(prediction: str, answer: str) -> float:
        overlap = (Counter(prediction.split()) & Counter(answer.split())).total()
        return 2 * overlap / (len(prediction.split()) + len(answer.split()))

    predictions, answers = map(list, zip(*pairs, strict=True))
    assert score(predictions, answers)["rouge1"] == pytest.approx(np.mean([f1(p, a) for p, a in pairs]))


@given(PAIRS)
def test_the_answers_themselves_score_one(pairs: list[tuple[str, str]]) -> None:
    answers = [answer for _, answer in pairs]
    scores = score(answers, answers)
    assert [value for value in scores.values() if not np.isnan(value)] == pytest.approx([1] * (5 - missing(scores)))


def missing(scores: dict[str, float]) -> int:
    return sum(np.isnan(value) for value in scores.values())


def test_no_row_of_a_kind_gives_nan_and_lists_must_match() -> None:
    assert np.isnan(score(["a"], ["lung"])["closed_acc"])
    assert np.isnan(summarize(measure([], [], []).sum(axis=0))["accuracy"])
    with pytest.raises(ValueError, match="zip"):
        score(["a"], ["lung", "liver"])
