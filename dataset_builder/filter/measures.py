"""How good a classifier of figures is, and how far two annotators agree, with 95 % bootstrap intervals.

Unusual here: a resample is a vector of weights, how often each row was drawn, and every measure takes weights [..., n]
and broadcasts over their leading axes. So all resamples are one array operation, and the estimate is the same function
with weights of one. Figures of one group (a paper, a patient) are drawn together. Clean is the positive class:
precision is the share of what is kept that is clean.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
METRICS = ("accuracy", "precision", "recall", "f1")

Measure = Callable[[np.ndarray], np.ndarray]  # weights [..., n] -> value [...]


def with_interval(measure: Measure, groups: Sequence[str]) -> dict[str, Any]:
    """{"value", "interval": [low, high]} of a measure on rows of these groups; None where it is undefined."""
    names, group_of_row = np.unique(np.asarray(groups), return_inverse=True)
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    value = float(measure(np.ones(len(groups))))
    samples = measure(draws[:, group_of_row].astype(float))
    samples = samples[~np.isnan(samples)]  # a resample without a row of a class has no precision
    if np.isnan(value) or not samples.size:
        return {"value": None, "interval": None}
    tail = (1 - CONFIDENCE) / 2
    return {"value": value, "interval": [float(bound) for bound in np.quantile(samples, [tail, 1 - tail])]}


def classification(is_clean: np.ndarray, scores: np.ndarray, threshold: float, groups: Sequence[str]) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 of `scores >= threshold`, and ROC AUC, each with its interval.

    `is_clean` [n] holds 0 or 1, `scores` [n] the probability of clean.
    """
    truth, kept = is_clean.astype(bool), scores >= threshold
    measures = {name: with_interval(_count_measure(name, truth, kept), groups) for name in METRICS}
    return {**measures, "roc_auc": with_interval(lambda weights: roc_auc(truth, scores, weights), groups)}


def _count_measure(name: str, truth: np.ndarray, kept: np.ndarray) -> Measure:
    def measure(weights: np.ndarray) -> np.ndarray:
        hits, misses, false_alarms = (
            weights[..., rows].sum(-1) for rows in (truth & kept, truth & ~kept, ~truth & kept)
        )
        above, below = {
            "accuracy": (weights[..., truth == kept].sum(-1), weights.sum(-1)),
            "precision": (hits, hits + false_alarms),
            "recall": (hits, hits + misses),
            "f1": (2 * hits, 2 * hits + misses + false_alarms),
        }[name]
        return _ratio(above, below)

    return measure


def roc_auc(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The chance [...] that a clean figure scores above a polluted one, ties counted half; weights [..., n]."""
    order = np.argsort(scores, kind="stable")
    truth, scores, weights = truth[order], scores[order], weights[..., order]
    clean, polluted = weights * truth, weights * ~truth
    below = np.cumsum(polluted, axis=-1)
    below = np.concatenate([np.zeros_like(below[..., :1]), below], axis=-1)  # [..., n + 1]
    first, last = np.searchsorted(scores, scores, "left"), np.searchsorted(scores, scores, "right")
    wins = (clean * (below[..., first] + below[..., last]) / 2).sum(-1)
    return _ratio(wins, clean.sum(-1) * polluted.sum(-1))


def kappa(first: Sequence[str], second: Sequence[str], weights: np.ndarray) -> np.ndarray:
    """Cohen's kappa [...] of two annotators' labels [n] of the same figures; weights [..., n]."""
    a, b = np.asarray(first), np.asarray(second)
    total = weights.sum(-1)
    agreed = weights[..., a == b].sum(-1) / total
    chance = sum(
        weights[..., a == label].sum(-1) * weights[..., b == label].sum(-1) / total**2 for label in np.union1d(a, b)
    )
    return _ratio(agreed - chance, 1 - np.asarray(chance))


def curves(is_clean: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    """ "threshold", falling, and the "precision", "recall" and "false_positive_rate" of keeping what reaches it."""
    order = np.argsort(-scores, kind="stable")
    hits, false_alarms = np.cumsum(is_clean[order]), np.cumsum(1 - is_clean[order])
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores are kept together
    hits, false_alarms = hits[last], false_alarms[last]
    return {
        "threshold": scores[order][last],
        "precision": hits / (hits + false_alarms),
        "recall": hits / hits[-1],
        "false_positive_rate": false_alarms / false_alarms[-1],
    }


def threshold_for(precision: float, is_clean: np.ndarray, scores: np.ndarray) -> float:
    """The threshold that keeps most clean figures among those whose precision on these rows is at least `precision`.

    ValueError where no threshold reaches it.
    """
    points = curves(is_clean, scores)
    reached = np.flatnonzero(points["precision"] >= precision)
    if not reached.size:
        best = points["precision"].max()
        raise ValueError(
            f"precision {precision} is not reached by any threshold on the cross-validated labels (best {best:.3f}); "
            "label more figures or ask for less"
        )
    return float(points["threshold"][reached[-1]])


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)
