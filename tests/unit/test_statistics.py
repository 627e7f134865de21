"""The statistics against sums by hand, brute force, scipy and simulation."""

import itertools
from functools import partial
from math import comb

import numpy as np
import pytest
from scipy import stats

from vismem.evaluation.statistics import (
    bootstrap_interval,
    holm,
    paired_difference,
    permutation_p,
    score_interval,
    share_interval,
)
from vismem.records import Difference

Arms = tuple[np.ndarray, np.ndarray]
compared = partial(paired_difference, resamples=500, seed=1)


def arms(both: int, only_arm: int, only_reference: int, neither: int) -> Arms:
    arm = np.array([100.0] * both + [100.0] * only_arm + [0.0] * only_reference + [0.0] * neither)
    reference = np.array([100.0] * both + [0.0] * only_arm + [100.0] * only_reference + [0.0] * neither)
    return arm, reference


def alone(scores: np.ndarray) -> np.ndarray:
    """Each item as a cluster of its own."""
    return np.arange(len(scores))


def correlated(clusters: int, seed: int, graded: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two arms on clusters of one to five items that are alike, and the clusters; 100 is right, 0 wrong."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(clusters), rng.integers(1, 6, clusters))
    ability = rng.standard_normal((2, clusters))[:, labels] + 0.7 * rng.standard_normal((2, len(labels)))
    scores = ability > [[-0.4], [0.0]]
    arm, reference = 100 * (scores * rng.random(scores.shape).round(1) if graded else scores.astype(float))
    return arm, reference, labels


# --- one question per cluster -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("better", "worse"), [(1, 0), (5, 1), (9, 3), (10, 10), (2, 15), (40, 21), (300, 100)])
def test_of_single_questions_the_permutation_test_is_mcnemars_binomial_sum(better: int, worse: int) -> None:
    total = better + worse
    tail = sum(comb(total, k) for k in range(min(better, worse) + 1)) / 2**total
    arm, reference = arms(7, better, worse, 4)
    assert permutation_p(arm, reference, alone(arm)) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_mcnemar_known_value() -> None:
    arm, reference = arms(3, 6, 0, 3)  # 6 against 0: 2 / 2**6
    assert permutation_p(arm, reference, alone(arm)) == pytest.approx(0.03125)


@pytest.mark.parametrize("resamples", [3, 20, 1000])
def test_of_single_questions_the_interval_ends_at_the_percentiles_of_the_means_of_the_drawn_items(
    resamples: int,
) -> None:
    scores = np.random.default_rng(1).random(40)
    means = scores[np.random.default_rng(4).integers(0, 40, size=(resamples, 40))].mean(axis=1)
    found = bootstrap_interval(scores, np.arange(40)[::-1], resamples=resamples, seed=4)
    assert found == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-12)


def test_the_bootstrap_agrees_with_every_resample_of_five_items() -> None:
    scores = np.array([0.0, 0.0, 1.0, 2.0, 5.0])
    means = [np.mean(drawn) for drawn in itertools.product(scores, repeat=5)]
    low, high = bootstrap_interval(scores, alone(scores), resamples=20_000, seed=3)
    assert (low, high) == pytest.approx((np.percentile(means, 2.5), np.percentile(means, 97.5)))


def test_drawing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).random(50)
    whole = bootstrap_interval(scores, alone(scores), resamples=300, seed=2)
    monkeypatch.setattr("vismem.evaluation.statistics._CELLS", 50 * 7)
    assert bootstrap_interval(scores, alone(scores), resamples=300, seed=2) == whole


def test_the_interval_of_a_difference_is_that_of_the_items_differences() -> None:
    arm, reference = np.random.default_rng(2).random((2, 30))
    found = compared(arm, reference, alone(arm)).ci95
    assert found == bootstrap_interval(arm - reference, alone(arm), resamples=500, seed=1)


def test_graded_scores_of_single_questions_are_compared_by_the_exact_sign_test() -> None:
    arm, reference = np.array([90.0, 30.0, 20.0, 55.0, 60.0, 1.0]), np.array([10.0, 20.0, 15.0, 54.0, 60.0, 2.0])
    expected = stats.binomtest(4, 5, 0.5).pvalue
    assert permutation_p(arm, reference, alone(arm)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [5, 12, 400])
def test_identical_arms_differ_by_nothing_and_few_items_say_little_of_others(n: int) -> None:
    """None of n differs: by Wilson's interval up to z^2 / (n + z^2) of all may, each by 100 points."""
    scores, end = np.resize([100.0, 0.0, 100.0], n), 100 * 1.959964**2 / (n + 1.959964**2)
    difference = compared(scores, scores.copy(), alone(scores))
    assert difference == Difference(delta=0.0, ci95=difference.ci95, p=1.0, detectable=None)
    assert difference.ci95 == pytest.approx((-end, end))
    together = compared(scores, scores.copy(), np.arange(n) // 4)
    assert together.ci95[1] > 1.5 * end, "of a quarter as many clusters"
    ahead = compared(np.full(n, 100.0), np.zeros(n), alone(scores))
    assert (ahead.delta, ahead.ci95) == (100.0, pytest.approx((100 - end, 100.0)))


def test_that_no_item_is_worse_does_not_exclude_that_some_are() -> None:
    arm, reference = arms(10, 1, 0, 29)
    low, high = bootstrap_interval(arm - reference, alone(arm), resamples=500, seed=1)
    unseen = 100 * 1.959964**2 / (40 + 1.959964**2)
    assert low == 0
    assert compared(arm, reference, alone(arm)).ci95 == pytest.approx((2.5 - np.hypot(2.5, unseen), high))
    assert compared(reference, arm, alone(arm)).ci95 == pytest.approx((-high, np.hypot(2.5, unseen) - 2.5))


def test_the_difference_is_the_difference_of_the_means() -> None:
    arm, reference = arms(30, 20, 5, 45)
    difference = compared(arm, reference, alone(arm))
    assert difference.delta == pytest.approx(15)
    assert difference.ci95[0] < 15 < difference.ci95[1]
    swapped = compared(reference, arm, alone(arm))
    assert swapped.delta == -difference.delta
    assert swapped.ci95 == pytest.approx(tuple(-end for end in reversed(difference.ci95)))
    assert swapped.p == difference.p


def test_pairing_narrows_the_interval_of_correlated_arms() -> None:
    arm, reference = arms(50, 6, 2, 42)
    paired = compared(arm, reference, alone(arm))
    unpaired = compared(arm, np.random.default_rng(0).permutation(reference), alone(arm))
    assert np.ptp(paired.ci95) < 0.6 * np.ptp(unpaired.ci95)


# --- clusters ---------------------------------------------------------------------------------------------------------


def test_an_interval_is_widened_by_the_design_effect_and_the_quantiles_of_t() -> None:
    """Sums 100, 0, 100 of 2, 1 and 3 items: mean 100/3, residuals 100/3, -100/3 and 0, two degrees of freedom."""
    arm, reference = np.array([100.0, 0, 0, 0, 100, 0, 0, 0]), np.array([0.0, 0, 0, 100, 0, 0, 0, 100])
    clusters = np.array(["a", "a", "b", "c", "b", "b", "b", "c"])
    difference, mean = arm - reference, 0.0
    by_clusters = np.sqrt((100**2 + 100**2 + 200**2) * 3 / 2) / 8  # sums 100, 100 and -200
    by_items = np.sqrt(4 * 100**2 * 8 / 7) / 8
    widening = by_clusters / by_items * 4.302653 / 2.364624
    found, plain = compared(arm, reference, clusters), compared(arm, reference, alone(arm))
    assert found.delta == plain.delta == difference.mean() == mean
    assert bootstrap_interval(difference, clusters, resamples=500, seed=1) == pytest.approx(
        tuple(widening * end for end in plain.ci95), rel=1e-6
    )
    assert plain.detectable == pytest.approx((2.364624 + 0.896030) * by_items, rel=1e-5)
    assert found.detectable == pytest.approx(widening * plain.detectable, rel=1e-6)
    assert found.p == 1.0, "sums 1, 1 and -2: no flip is nearer to 0"


@pytest.mark.parametrize("seed", range(8))
def test_p_is_the_share_of_all_sign_flips_of_the_clusters(seed: int) -> None:
    arm, reference, clusters = correlated(11, seed)
    sums = [(arm - reference)[clusters == cluster].sum() for cluster in range(11)]
    flips = [abs(np.dot(signs, sums)) >= abs(sum(sums)) for signs in itertools.product((-1, 1), repeat=11)]
    assert permutation_p(arm, reference, clusters) == pytest.approx(np.mean(flips), rel=1e-12)


@pytest.mark.parametrize("graded", [False, True])
def test_every_question_twice_in_its_cluster_says_no_more(graded: bool) -> None:
    """The invariant that breaks where questions are taken for independent."""
    arm, reference, clusters = correlated(40, 1, graded)
    once, twice, independent = (
        paired_difference(*arms, labels, resamples=20_000, seed=0)
        for arms, labels in (
            ((arm, reference), clusters),
            ((np.repeat(arm, 2), np.repeat(reference, 2)), np.repeat(clusters, 2)),
            ((np.repeat(arm, 2), np.repeat(reference, 2)), np.arange(2 * len(arm))),
        )
    )
    assert twice.ci95 == pytest.approx(once.ci95, abs=0.03 * np.ptp(once.ci95))
    assert twice.detectable == pytest.approx(once.detectable, rel=0.01)
    assert twice.p == pytest.approx(once.p)
    assert score_interval(np.repeat(arm, 2), np.repeat(clusters, 2)) == pytest.approx(
        score_interval(arm, clusters), rel=0.01
    )
    assert np.ptp(independent.ci95) < 0.8 * np.ptp(once.ci95)
    assert independent.p < once.p


def test_the_names_of_clusters_and_the_order_of_questions_change_nothing() -> None:
    arm, reference, clusters = correlated(30, 2)
    expected, score = compared(arm, reference, clusters), score_interval(arm, clusters)
    names = np.array([f"{(7 * label) % 30:03d}" for label in clusters])
    found = compared(arm, reference, names)
    assert found.model_dump(exclude={"ci95"}) == pytest.approx(expected.model_dump(exclude={"ci95"}))
    assert found.ci95 == pytest.approx(expected.ci95)
    order = np.random.default_rng(0).permutation(len(arm))
    assert permutation_p(arm[order], reference[order], names[order]) == pytest.approx(expected.p)
    assert score_interval(arm[order], names[order]) == pytest.approx(score)


def test_the_interval_covers_the_truth_and_the_test_its_level_where_questions_share_images() -> None:
    rng, covered, claimed, taken_for_independent = np.random.default_rng(11), 0, 0, 0
    clusters = np.repeat(np.arange(40), 10)
    for _ in range(300):
        ability = rng.standard_normal((2, 40))[:, clusters] + 0.5 * rng.standard_normal((2, 400))
        arm, reference = 100.0 * (ability > 0)
        found = compared(arm, reference, clusters)
        covered += found.ci95[0] <= 0 <= found.ci95[1]
        claimed += found.outcome != "not shown"
        taken_for_independent += compared(arm, reference, alone(arm)).outcome != "not shown"
    assert 274 <= covered <= 296
    assert claimed <= 26
    assert taken_for_independent > 100


def test_a_single_cluster_shows_nothing() -> None:
    arm, reference = arms(1, 8, 0, 1)
    found = compared(arm, reference, np.zeros(10))
    assert (found.ci95, found.p, found.detectable) == ((-100.0, 100.0), 1.0, None)
    assert score_interval(arm, np.zeros(10)) == (0.0, 100.0)


def test_no_interval_reaches_beyond_what_a_score_can_be() -> None:
    arm, reference = arms(0, 3, 0, 3)
    assert compared(arm, reference, np.repeat([0, 1], 3)).ci95 == (-100.0, 100.0)
    gains = np.full(6, 100.0), np.full(6, -100.0)
    assert compared(*gains, np.repeat([0, 1, 2], 2)).ci95 == pytest.approx((43.5973, 200.0)), "gains may differ by more"
    low, high = score_interval(np.array([100.0, 0.0]), np.arange(2))
    assert 0 <= low < 50 < high <= 100


# --- single scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(5, 5), (0, 5), (1, 1), (1, 1000), (400, 1000), (1000, 1000)])
def test_the_interval_of_a_score_of_single_questions_is_wilsons(right: int, n: int) -> None:
    found = score_interval(np.array([100.0] * right + [0.0] * (n - right)), np.arange(n))
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)
    assert found[1] - found[0] > 0, "5 of 5 are not 100 to 100"


def test_clusters_that_are_all_alike_count_as_a_question_each_with_the_quantile_of_t() -> None:
    alike = np.repeat(np.arange(5), 4)
    q = 1.959964 * 2.776445 / 2.093024
    assert score_interval(np.full(20, 100.0), alike) == pytest.approx((100 * 5 / (5 + q**2), 100.0), rel=1e-6)
    half = score_interval(np.tile([100.0, 0.0], 10), alike)
    assert half[0] < 25 < 75 < half[1]


def test_questions_that_are_right_together_make_a_score_less_certain() -> None:
    rights = np.repeat([100.0, 0.0, 100.0, 0.0, 0.0, 100.0, 100.0, 0.0], 5)
    together = score_interval(rights, np.repeat(np.arange(8), 5))
    for one, by in ((score_interval(rights[::5], np.arange(8)), 1), (score_interval(rights, alone(rights)), 1.8)):
        assert np.ptp(together) > by * np.ptp(one)


# --- several comparisons, shares, errors ------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.2, 0.9, 0.6]) == pytest.approx([0.6, 1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_a_share_has_the_interval_of_the_ratio_of_paired_sums() -> None:
    part, whole = np.array([1.0, 0.0, 3.0, 1.0]), np.array([2.0, 1.0, 4.0, 1.0])
    share = partial(share_interval, resamples=400, seed=3)
    low, high = share(part, whole, np.arange(4))
    assert 0 <= low < 0.625 < high <= 1, "no draw can have more of the part than of the whole"
    assert share(0.5 * whole, whole, np.arange(4)) == pytest.approx((0.5, 0.5))
    residuals = part - 0.625 * whole
    sums = np.array([residuals[:2].sum(), residuals[2], residuals[3]])
    wider = np.sqrt((sums @ sums) * (3 / 2) / (residuals @ residuals * (4 / 3))) * 4.302653 / 3.182446
    expected = (0.625 + wider * (low - 0.625), 0.625 + wider * (high - 0.625))
    assert share(part, whole, np.array([0, 0, 1, 2])) == pytest.approx(expected, rel=1e-5)


def test_a_share_of_nothing_is_left_out_of_the_draws_and_refused_where_all_are() -> None:
    share = partial(share_interval, resamples=100, seed=0)
    assert share(np.array([0.0, 1.0]), np.array([0.0, 2.0]), np.arange(2)) == (0.5, 0.5)
    with pytest.raises(ValueError, match="share of 0"):
        share(np.zeros(3), np.zeros(3), np.arange(3))


def test_no_items_or_unpaired_items_or_items_without_a_cluster_are_an_error() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_interval(np.array([]), np.array([]), resamples=100, seed=0)
    with pytest.raises(ValueError, match="same items"):
        permutation_p(np.ones(3), np.ones(4), np.arange(3))
    with pytest.raises(ValueError, match="every item needs its cluster"):
        permutation_p(np.ones(3), np.zeros(3), np.arange(2))
