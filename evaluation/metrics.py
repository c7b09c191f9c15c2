"""Closed and open accuracy, BLEU-1 and ROUGE-1 of Table 1, under the convention named `strict`.

The paper reports the four numbers but neither it nor its code defines them, so the convention is stated here:

- An answer counts as correct when it equals the reference after VQA-v2-like normalisation (`normalize`).
- "Closed" is what the source labels closed; without a label, what is answered by yes or no.
- BLEU-1 is sacrebleu's corpus score and ROUGE-1 the mean rouge-score F, both over all rows, on the raw text.
- An empty prediction scores 0 and is counted: no row ever leaves a mean.

Every score is a function of sums over rows (`measure`, then `summarize`): the bootstrap of `statistics.py` adds the
same sums up over resampled images, so a value and its interval cannot come from different formulas.
rouge-score reads only the letters a-z and digits, so ROUGE-1 is 0 for answers in other scripts.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

CONVENTION = "strict"

# What a row adds to the sums: the columns of `measure`.
MEASURES = (
    "closed_hits",
    "closed_rows",
    "open_hits",
    "open_rows",
    "matched_words",
    "predicted_words",
    "reference_words",
    "rouge1",
)

_ARTICLES = frozenset({"a", "an", "the"})
# VQA-v2 also reads "none" as 0; here "none" answers "which lesion?" as well, so it stays a word.
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
# Apostrophes and the comma of "1,000" join what they separate; all other punctuation separates.
_JOINING = re.compile(r"['’`]|(?<=\d),(?=\d{3}(?!\d))")
_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)")


def normalize(text: str) -> str:
    """Lower case, NFKC, no punctuation, no articles, number words as digits, single blanks (VQA-v2's evaluation).

    A decimal point stays. Articles stay where nothing else is left, so that the choice "A" is not an empty answer.
    """
    text = _JOINING.sub("", unicodedata.normalize("NFKC", text)).lower()
    # Lowering and joining can leave a letter apart from its accent, so the text is composed a second time.
    text = unicodedata.normalize("NFKC", text)
    words = ".".join(_blank_punctuation(part) for part in _DECIMAL_POINT.split(text)).split()
    words = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_DIGITS.get(word, word) for word in words)


def is_correct(prediction: str, answer: str) -> bool:
    """Whether both normalise to the same text; an empty prediction never is."""
    normalized = normalize(prediction)
    return normalized != "" and normalized == normalize(answer)


def labelled_type(answer_type: str | None) -> str | None:
    """ "closed" or "open" as the source labels it (VQA-RAD writes "CLOSED "), None without a label.

    Raises ValueError on any other label.
    """
    label = (answer_type or "").strip().lower()
    if label not in ("", "closed", "open"):
        raise ValueError(f"answer_type {answer_type!r} is neither 'closed' nor 'open'")
    return label or None


def answer_kind(answer: str, answer_type: str | None = None) -> str:
    """ "closed" or "open": by the label, else closed is what is answered by yes or no."""
    by_answer = "closed" if normalize(answer) in ("yes", "no") else "open"
    return labelled_type(answer_type) or by_answer


def measure(predictions: Sequence[str], answers: Sequence[str], kinds: Sequence[str]) -> np.ndarray:
    """What each row adds to the sums of `MEASURES`: float64 [rows, 8].

    `kinds` says "closed" or "open" of each row (`answer_kind`). Lists of different lengths raise ValueError.
    """
    rouge = RougeScorer(["rouge1"], use_stemmer=False)
    bleu = BLEU(max_ngram_order=1, effective_order=True)  # effective_order only silences its warning on single rows
    rows = []
    for prediction, answer, kind in zip(predictions, answers, kinds, strict=True):
        closed, hit = kind == "closed", is_correct(prediction, answer)
        words = bleu.sentence_score(prediction, [answer])
        overlap = rouge.score(answer, prediction)["rouge1"].fmeasure
        accuracy = (closed and hit, closed, not closed and hit, not closed)
        rows.append((*accuracy, words.counts[0], words.totals[0], words.ref_len, overlap))
    return np.array(rows, dtype=np.float64).reshape(-1, len(MEASURES))


def summarize(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The scores that sums of rows give, 0 to 1: [..., 8] to {name: [...]}; NaN where no row counts.

    Several sums at once, such as those of bootstrap resamples, stand in the leading dimensions.
    """
    closed_hits, closed, open_hits, open_, matched, predicted, reference, rouge = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.exp(np.minimum(0.0, 1.0 - reference / predicted))
        return {
            "closed_acc": closed_hits / closed,
            "open_acc": open_hits / open_,
            "accuracy": (closed_hits + open_hits) / (closed + open_),
            "bleu1": np.where(predicted > 0, brevity * matched / predicted, 0.0),
            "rouge1": rouge / (closed + open_),
        }


def score(
    predictions: Sequence[str], answers: Sequence[str], answer_types: Sequence[str | None] | None = None
) -> dict[str, float]:
    """closed_acc, open_acc, accuracy, bleu1 and rouge1 (0 to 1) of predictions against answers, row by row."""
    types = [None] * len(answers) if answer_types is None else answer_types
    kinds = [answer_kind(answer, label) for answer, label in zip(answers, types, strict=True)]
    return {name: float(value) for name, value in summarize(measure(predictions, answers, kinds).sum(axis=0)).items()}


def _blank_punctuation(text: str) -> str:
    """Blanks for the characters of Unicode's punctuation and symbol categories."""
    return "".join(" " if unicodedata.category(character)[0] in "PS" else character for character in text)
