"""95 % bootstrap intervals clustered by image.

The questions of one image share its errors, so images are drawn and each brings all of its rows. A resample is a vector
of how often each image was drawn: all of them are one multinomial draw, and their sums one matrix product, with no
loop over rows. The seed is fixed, so the same predictions always give the same interval.
"""

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0


def resampled_sums(measures: np.ndarray, clusters: Sequence[str], resamples: int = RESAMPLES) -> np.ndarray:
    """Column sums of `measures` [rows, k] over each bootstrap resample of the clusters: [resamples, k].

    `clusters` names the image of each row; a list of another length raises ValueError.
    """
    if len(clusters) != len(measures):
        raise ValueError(f"{len(measures)} rows but {len(clusters)} cluster names")
    names, cluster_of_row = np.unique(np.asarray(clusters), return_inverse=True)
    cluster_sums = np.zeros((len(names), measures.shape[1]))  # [C, k]
    np.add.at(cluster_sums, cluster_of_row, measures)
    chances = np.full(len(names), 1 / len(names))
    draws = np.random.default_rng(SEED).multinomial(len(names), chances, size=resamples)  # [resamples, C]
    return draws @ cluster_sums


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The percentile interval (low, high) of bootstrap samples [resamples].

    A resample that drew no row of the kind in question is NaN and left out; ValueError where all are.
    """
    values = samples[~np.isnan(samples)]
    if not values.size:
        raise ValueError("no resample has a value")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(values: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> tuple[float, float]:
    """The interval (low, high) of the mean of `values` [rows], clustered by image."""
    column = np.asarray(values, dtype=np.float64)
    sums = resampled_sums(np.stack([column, np.ones_like(column)], axis=1), clusters)
    return interval(sums[:, 0] / sums[:, 1])


def paired_difference(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, clusters: Sequence[str]
) -> tuple[float, tuple[float, float]]:
    """Mean of `first - second` and its interval, for two sets of scores [rows] of the same rows in the same order.

    Pairing takes the difficulty that both share out of the interval. Different lengths raise ValueError.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} scores cannot be paired with {len(second)}")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return float(differences.mean()), mean_interval(differences, clusters)
