"""The statistics against sums by hand, brute force and simulation."""

import itertools
from math import comb

import numpy as np
import pytest

from vismem.evaluation.statistics import bootstrap_interval, mcnemar, paired_difference, share_interval


def arms(both: int, only_arm: int, only_reference: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    arm = np.array([1.0] * both + [1.0] * only_arm + [0.0] * only_reference + [0.0] * neither)
    reference = np.array([1.0] * both + [0.0] * only_arm + [1.0] * only_reference + [0.0] * neither)
    return arm, reference


@pytest.mark.parametrize(("better", "worse"), [(1, 0), (5, 1), (9, 3), (10, 10), (2, 15), (40, 21)])
def test_mcnemar_is_the_binomial_sum_by_hand(better: int, worse: int) -> None:
    total = better + worse
    tail = sum(comb(total, k) for k in range(min(better, worse) + 1)) / 2**total
    arm, reference = arms(7, better, worse, 4)
    assert mcnemar(arm, reference) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


def test_mcnemar_known_value() -> None:
    # 6 against 0: 2 / 2**6
    assert mcnemar(*arms(3, 6, 0, 3)) == pytest.approx(0.03125)


def test_identical_arms_differ_by_nothing() -> None:
    scores = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    difference = paired_difference(scores, scores.copy(), resamples=200, seed=0)
    assert (difference.delta, difference.ci95, difference.p) == (0.0, (0.0, 0.0), 1.0)


def test_the_difference_is_the_difference_of_the_means() -> None:
    arm, reference = arms(30, 20, 5, 45)
    difference = paired_difference(arm, reference, resamples=500, seed=1)
    assert difference.delta == pytest.approx(0.15)
    assert difference.ci95[0] < 0.15 < difference.ci95[1]
    swapped = paired_difference(reference, arm, resamples=500, seed=1)
    assert swapped.delta == -difference.delta
    assert swapped.p == difference.p


def test_pairing_narrows_the_interval_of_correlated_arms() -> None:
    arm, reference = arms(50, 6, 2, 42)
    paired = paired_difference(arm, reference, resamples=2000, seed=0)
    shuffled = np.random.default_rng(0).permutation(reference)
    unpaired = paired_difference(arm, shuffled, resamples=2000, seed=0)
    assert np.ptp(paired.ci95) < 0.6 * np.ptp(unpaired.ci95)


def test_the_bootstrap_agrees_with_every_resample_of_three_items() -> None:
    scores = np.array([0.0, 0.0, 1.0])
    means = sorted(np.mean(drawn) for drawn in itertools.product(scores, repeat=3))
    low, high = bootstrap_interval(scores, resamples=20_000, seed=3, coverage=0.6)
    assert (low, high) == pytest.approx((np.percentile(means, 20), np.percentile(means, 80)))


@pytest.mark.parametrize("resamples", [3, 20, 1000])
def test_the_interval_ends_at_the_percentiles_of_the_means_of_the_drawn_items(resamples: int) -> None:
    scores = np.random.default_rng(1).random(40)
    drawn = np.random.default_rng(4).integers(0, 40, size=(resamples, 40))
    means = scores[drawn].mean(axis=1)
    found = bootstrap_interval(scores, resamples=resamples, seed=4)
    assert found == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-12)


def test_the_interval_of_a_difference_is_that_of_the_items_differences() -> None:
    arm, reference = np.random.default_rng(2).random((2, 30))
    found = paired_difference(arm, reference, resamples=50, seed=9).ci95
    assert found == bootstrap_interval(arm - reference, resamples=50, seed=9)


def test_the_interval_has_the_normal_width_and_depends_on_the_seed_alone() -> None:
    scores = np.array([1.0] * 300 + [0.0] * 700)
    low, high = bootstrap_interval(scores, resamples=4000, seed=5)
    assert (low, high) == bootstrap_interval(scores, resamples=4000, seed=5)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert high - 0.3 == pytest.approx(half, rel=0.1)
    assert 0.3 - low == pytest.approx(half, rel=0.1)


def test_drawing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).random(50)
    whole = bootstrap_interval(scores, resamples=300, seed=2)
    monkeypatch.setattr("vismem.evaluation.statistics._CELLS", 50 * 7)
    assert bootstrap_interval(scores, resamples=300, seed=2) == whole


def test_the_interval_covers_the_truth_in_most_simulations() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(200):
        scores = (rng.random(150) < 0.6).astype(float)
        low, high = bootstrap_interval(scores, resamples=400, seed=trial)
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 199


def test_no_items_or_unpaired_items_are_an_error() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_interval(np.array([]), resamples=100, seed=0)
    with pytest.raises(ValueError, match="same items"):
        mcnemar(np.ones(3), np.ones(4))


def test_a_share_has_the_interval_of_the_ratio_of_paired_sums() -> None:
    part, whole = np.array([1.0, 0.0, 3.0, 1.0]), np.array([2.0, 1.0, 4.0, 1.0])
    low, high = share_interval(part, whole, resamples=400, seed=3)
    assert low < part.sum() / whole.sum() < high
    assert low >= 0
    assert high <= 1, "no draw can have more of the part than of the whole"
    assert share_interval(0.5 * whole, whole, resamples=400, seed=3) == pytest.approx((0.5, 0.5))


def test_a_share_of_nothing_is_left_out_of_the_draws_and_refused_where_all_are() -> None:
    assert share_interval(np.array([0.0, 1.0]), np.array([0.0, 2.0]), resamples=100, seed=0) == (0.5, 0.5)
    with pytest.raises(ValueError, match="share of 0"):
        share_interval(np.zeros(3), np.zeros(3), resamples=100, seed=0)
