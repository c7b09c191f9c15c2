"""Measures against values worked out by hand and against scipy."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from biod2c.dataset_builder.filter.measures import classification, curves, roc_auc, threshold_for, with_interval

TRUTH = np.array([1, 1, 0, 1, 0, 0])
SCORES = np.array([0.9, 0.8, 0.8, 0.6, 0.3, 0.1])
GROUPS = list("abcdef")


def test_classification_by_hand():
    """At 0.6: three hits, one false alarm, two rightly left out."""
    metrics = classification(TRUTH, SCORES, 0.6, GROUPS)
    values = {name: metric["value"] for name, metric in metrics.items()}
    assert values == pytest.approx(
        {"accuracy": 5 / 6, "precision": 3 / 4, "recall": 1, "f1": 6 / 7, "roc_auc": 7.5 / 9}
    )
    assert all(low <= metrics[name]["value"] <= high for name in metrics for low, high in [metrics[name]["interval"]])


def test_auc_is_scipys_with_ties_and_with_repeated_rows():
    rng = np.random.default_rng(0)
    truth, scores, times = rng.random(80) < 0.4, rng.integers(0, 20, 80) / 20, rng.integers(0, 4, 80)
    rows = np.repeat(np.arange(80), times)
    clean, polluted = scores[rows][truth[rows]], scores[rows][~truth[rows]]
    expected = mannwhitneyu(clean, polluted).statistic / (len(clean) * len(polluted))
    assert roc_auc(truth, scores, times.astype(float)) == pytest.approx(expected)


def test_figures_of_one_group_are_drawn_together():
    """Forty copies of one paper's figure say no more than one: the interval must not shrink."""
    values = np.random.default_rng(0).random(30)
    groups = [str(number) for number in range(30)]

    def mean_of(copies):
        rows = np.repeat(values, copies)
        return with_interval(
            lambda weights: (weights * rows).sum(-1) / weights.sum(-1), list(np.repeat(groups, copies))
        )

    once, often = mean_of(1), mean_of(40)
    assert often["interval"] == pytest.approx(once["interval"])
    width = once["interval"][1] - once["interval"][0]
    assert width == pytest.approx(2 * 1.96 * values.std() / 30**0.5, rel=0.1)


def test_what_no_row_defines_has_no_value():
    metrics = classification(np.ones(4), np.zeros(4), 0.5, list("abcd"))
    assert metrics["precision"] == metrics["roc_auc"] == {"value": None, "interval": None}


def test_equal_scores_are_kept_together():
    points = curves(TRUTH, SCORES)
    assert points["threshold"].tolist() == [0.9, 0.8, 0.6, 0.3, 0.1]
    assert points["precision"] == pytest.approx([1, 2 / 3, 3 / 4, 3 / 5, 1 / 2])
    assert points["recall"] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


def test_the_threshold_keeps_most_at_the_wanted_precision():
    assert threshold_for(0.75, TRUTH, SCORES) == 0.6
    assert threshold_for(0.76, TRUTH, SCORES) == 0.9
    with pytest.raises(ValueError, match=r"precision 0.9 is not reached .* \(best 0.667\)"):
        threshold_for(0.9, TRUTH[1:], SCORES[1:])
