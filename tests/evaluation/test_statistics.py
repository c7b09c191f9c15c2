"""The clustered bootstrap against closed forms, a loop written here, and what clustering must mean."""

import numpy as np
import pytest

from biod2c.evaluation import mean_interval, paired_difference
from biod2c.evaluation.statistics import interval, resampled_sums


def rows(clusters: int = 40, largest: int = 9, seed: int = 3) -> tuple[np.ndarray, list[str]]:
    """0/1 scores that agree within an image, images of different sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, largest + 1, size=clusters)
    ability = rng.uniform(0.2, 1.0, size=clusters)
    values = np.concatenate([rng.random(size) < chance for size, chance in zip(sizes, ability, strict=True)])
    return values.astype(float), [f"image{i}" for i, size in enumerate(sizes) for _ in range(size)]


def bootstrap_means(values: np.ndarray, clusters: list[str]) -> np.ndarray:
    sums = resampled_sums(np.stack([values, np.ones_like(values)], axis=1), clusters, resamples=20_000)
    return sums[:, 0] / sums[:, 1]


def test_spread_of_single_rows_is_the_closed_form() -> None:
    values, _ = rows()
    means = bootstrap_means(values, [str(i) for i in range(len(values))])
    assert means.mean() == pytest.approx(values.mean(), abs=2e-3)
    assert means.std() == pytest.approx(values.std() / np.sqrt(len(values)), rel=0.02)


def test_spread_of_equal_clusters_is_that_of_their_means() -> None:
    values = rows(clusters=60, largest=1)[0].repeat(4)
    per_cluster = values.reshape(-1, 4).mean(axis=1)
    means = bootstrap_means(values, [str(i // 4) for i in range(len(values))])
    assert means.std() == pytest.approx(per_cluster.std() / np.sqrt(len(per_cluster)), rel=0.02)


def test_interval_equals_a_loop_over_resamples() -> None:
    values, clusters = rows()
    by_image = [values[np.array(clusters) == name] for name in sorted(set(clusters))]
    rng = np.random.default_rng(1)
    means = [
        np.concatenate([by_image[i] for i in rng.integers(len(by_image), size=len(by_image))]).mean()
        for _ in range(4000)
    ]
    assert mean_interval(values, clusters) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.012)


def test_asking_an_image_twice_adds_no_certainty() -> None:
    values, clusters = rows()
    assert mean_interval(values.repeat(2), np.repeat(clusters, 2)) == mean_interval(values, clusters)


def test_order_of_rows_does_not_matter_and_the_seed_is_fixed() -> None:
    values, clusters = rows()
    order = np.random.default_rng(0).permutation(len(values))
    assert mean_interval(values[order], np.array(clusters)[order]) == pytest.approx(mean_interval(values, clusters))


def test_paired_difference() -> None:
    first, clusters = rows()
    second = first.copy()
    assert paired_difference(first, second, clusters) == (0.0, (0.0, 0.0))
    second[::5] = 1 - second[::5]
    value, (low, high) = paired_difference(first, second, clusters)
    assert value == pytest.approx(first.mean() - second.mean())
    assert low <= value <= high
    back, bounds = paired_difference(second, first, clusters)
    assert (back, bounds) == (-value, pytest.approx((-high, -low)))


def test_pairing_is_narrower_than_two_intervals() -> None:
    first, clusters = rows()
    second = first.copy()
    second[:5] = 0
    _, (low, high) = paired_difference(first, second, clusters)
    alone = mean_interval(first, clusters)
    assert high - low < alone[1] - alone[0]


def test_resamples_without_a_value_are_left_out() -> None:
    assert interval(np.array([0.5, np.nan, 0.5])) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no resample"):
        interval(np.array([np.nan]))


def test_lengths_must_match() -> None:
    with pytest.raises(ValueError, match="3 rows but 2"):
        mean_interval([1, 0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="2 scores cannot be paired with 1"):
        paired_difference([1, 0], [1], ["a", "b"])
