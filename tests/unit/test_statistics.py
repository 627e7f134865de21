"""The statistics against sums by hand, brute force, scipy and simulation."""

import itertools
from math import comb

import numpy as np
import pytest
from scipy import stats

from vismem.evaluation.statistics import holm, paired_difference, permutation_p, ratio_interval, score_interval
from vismem.records import Difference

Arms = tuple[np.ndarray, np.ndarray]


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


def test_of_single_questions_the_interval_is_that_of_the_paired_t_test() -> None:
    arm, reference = np.random.default_rng(2).random((2, 30))
    expected = stats.ttest_rel(arm, reference).confidence_interval(0.95)
    found = paired_difference(arm, reference, alone(arm)).ci95
    assert found == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_identical_arms_differ_by_nothing() -> None:
    scores = np.array([100.0, 0.0, 100.0, 100.0, 0.0])
    difference = paired_difference(scores, scores.copy(), alone(scores))
    assert difference == Difference(delta=0.0, ci95=(0.0, 0.0), p=1.0, detectable=None)


def test_the_difference_is_the_difference_of_the_means() -> None:
    arm, reference = arms(30, 20, 5, 45)
    difference = paired_difference(arm, reference, alone(arm))
    assert difference.delta == pytest.approx(15)
    assert difference.ci95[0] < 15 < difference.ci95[1]
    swapped = paired_difference(reference, arm, alone(arm))
    assert swapped.delta == -difference.delta
    assert swapped.ci95 == pytest.approx(tuple(-end for end in reversed(difference.ci95)))
    assert swapped.p == difference.p


def test_pairing_narrows_the_interval_of_correlated_arms() -> None:
    arm, reference = arms(50, 6, 2, 42)
    paired = paired_difference(arm, reference, alone(arm))
    unpaired = paired_difference(arm, np.random.default_rng(0).permutation(reference), alone(arm))
    assert np.ptp(paired.ci95) < 0.6 * np.ptp(unpaired.ci95)


# --- clusters ---------------------------------------------------------------------------------------------------------


def test_an_interval_by_hand() -> None:
    """Sums 100, 0, 100 of 2, 1 and 3 items: mean 100/3, residuals 100/3, -100/3 and 0, two degrees of freedom."""
    arm, reference = np.array([100.0, 0, 0, 0, 100, 100]), np.array([0.0, 0, 0, 100, 0, 0])
    found = paired_difference(arm, reference, np.array(["a", "a", "b", "c", "c", "c"]))
    error = np.sqrt(2 * (100 / 3) ** 2 / 6**2 * 3 / 2)
    assert found.delta == pytest.approx(100 / 3)
    assert found.ci95 == pytest.approx((100 / 3 - 4.302653 * error, 100 / 3 + 4.302653 * error), rel=1e-6)
    assert found.detectable == pytest.approx((4.302653 + 1.060660) * error, rel=1e-6)
    assert found.p == 0.5, "of four signs of 100 and 100 two are as far from 0"


@pytest.mark.parametrize("seed", range(8))
def test_p_is_the_share_of_all_sign_flips_of_the_clusters(seed: int) -> None:
    arm, reference, clusters = correlated(11, seed)
    sums = [(arm - reference)[clusters == cluster].sum() for cluster in range(11)]
    flips = [abs(np.dot(signs, sums)) >= abs(sum(sums)) for signs in itertools.product((-1, 1), repeat=11)]
    assert permutation_p(arm, reference, clusters) == pytest.approx(np.mean(flips), rel=1e-12)


def test_p_of_graded_scores_is_near_that_of_all_sign_flips_and_the_same_each_time() -> None:
    arm, reference, clusters = correlated(12, 3, graded=True)
    sums = np.array([(arm - reference)[clusters == cluster].sum() for cluster in range(12)])
    signs = np.array(list(itertools.product((-1, 1), repeat=12)))
    exact = (np.abs(signs @ sums) >= abs(sums.sum()) - 1e-6).mean()
    found = permutation_p(arm, reference, clusters)
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact / 9999))
    assert found == permutation_p(arm, reference, clusters)


def test_flips_drawn_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    graded = correlated(12, 3, graded=True)
    whole = permutation_p(*graded)
    monkeypatch.setattr("vismem.evaluation.statistics._CELLS", 12 * 7)
    assert permutation_p(*graded) == whole


@pytest.mark.parametrize("graded", [False, True])
def test_every_question_twice_in_its_cluster_says_no_more(graded: bool) -> None:
    """The invariant that breaks where questions are taken for independent."""
    arm, reference, clusters = correlated(40, 1, graded)
    once = paired_difference(arm, reference, clusters)
    twice = paired_difference(*(np.repeat(values, 2) for values in (arm, reference, clusters)))
    assert twice.ci95 == pytest.approx(once.ci95, rel=1e-9)
    assert (twice.p, twice.detectable) == pytest.approx((once.p, once.detectable))
    assert score_interval(np.repeat(arm, 2), np.repeat(clusters, 2)) == pytest.approx(score_interval(arm, clusters))
    independent = paired_difference(np.repeat(arm, 2), np.repeat(reference, 2), alone(np.repeat(arm, 2)))
    assert np.ptp(independent.ci95) < 0.8 * np.ptp(once.ci95)
    assert independent.p < once.p


@pytest.mark.parametrize("graded", [False, True])
def test_the_order_of_questions_and_the_names_of_clusters_change_nothing(graded: bool) -> None:
    arm, reference, clusters = correlated(30, 2, graded)
    expected, score = paired_difference(arm, reference, clusters), score_interval(arm, clusters)
    within = np.lexsort((np.random.default_rng(0).random(len(arm)), clusters))
    assert (within != np.arange(len(arm))).any()
    found = paired_difference(arm[within], reference[within], np.array([f"{c:03d}" for c in clusters[within]]))
    assert found.ci95 == pytest.approx(expected.ci95)
    assert found.p == expected.p
    assert score_interval(arm[within], clusters[within]) == pytest.approx(score)


def test_the_interval_covers_the_truth_and_the_test_its_level_where_questions_share_images() -> None:
    rng, covered, claimed, taken_for_independent = np.random.default_rng(11), 0, 0, 0
    clusters = np.repeat(np.arange(40), 10)
    for _ in range(300):
        ability = rng.standard_normal((2, 40))[:, clusters] + 0.5 * rng.standard_normal((2, 400))
        arm, reference = 100.0 * (ability > 0)
        found = paired_difference(arm, reference, clusters)
        covered += found.ci95[0] <= 0 <= found.ci95[1]
        claimed += found.outcome != "not shown"
        taken_for_independent += paired_difference(arm, reference, alone(arm)).outcome != "not shown"
    assert 274 <= covered <= 296
    assert claimed <= 26
    assert taken_for_independent > 100


def test_a_single_cluster_shows_nothing() -> None:
    arm, reference = arms(1, 8, 0, 1)
    found = paired_difference(arm, reference, np.zeros(10))
    assert (found.ci95, found.p, found.detectable) == ((-100.0, 100.0), 1.0, None)
    assert score_interval(arm, np.zeros(10)) == (0.0, 100.0)


def test_no_interval_reaches_beyond_what_a_score_can_be() -> None:
    arm, reference = arms(0, 1, 0, 1)
    assert paired_difference(arm, reference, alone(arm)).ci95 == (-100.0, 100.0)
    low, high = score_interval(np.array([100.0, 0.0]), np.arange(2))
    assert 0 <= low < 50 < high <= 100


# --- single scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(5, 5), (0, 5), (1, 1000), (400, 1000), (1000, 1000)])
def test_the_interval_of_a_score_is_wilsons_with_the_quantile_of_t(right: int, n: int) -> None:
    low, high = score_interval(np.array([100.0] * right + [0.0] * (n - right)), np.arange(n))
    q, share = stats.t.ppf(0.975, n - 1), right / n
    for end in (low / 100, high / 100):  # where the score is q standard errors away, as the end would have them
        if 0 < end < 1:
            assert abs(end - share) == pytest.approx(q * np.sqrt(end * (1 - end) / n), rel=1e-9)
    assert low < 100 * share < high or 100 * share in (low, high)
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    if n == 1000:
        assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), rel=0.01, abs=1e-9)


def test_five_of_five_are_not_a_hundred_to_a_hundred() -> None:
    low, high = score_interval(np.full(5, 100.0), np.arange(5))
    assert (low, high) == pytest.approx((100 * 5 / (5 + 2.776445**2), 100.0), rel=1e-6)


def test_clusters_that_are_all_alike_count_as_a_question_each() -> None:
    alike = np.repeat(np.arange(5), 4)
    assert score_interval(np.full(20, 100.0), alike) == score_interval(np.full(5, 100.0), np.arange(5))
    half = score_interval(np.tile([100.0, 0.0], 10), alike)
    assert half[0] < 25 < 75 < half[1]


def test_questions_that_are_right_together_make_a_score_less_certain() -> None:
    rights = np.repeat([100.0, 0.0, 100.0, 0.0, 0.0, 100.0, 100.0, 0.0], 5)
    together = score_interval(rights, np.repeat(np.arange(8), 5))
    assert together == pytest.approx(score_interval(rights[::5], np.arange(8)))
    assert np.ptp(together) > 2 * np.ptp(score_interval(rights, alone(rights)))


# --- several comparisons, shares, errors ------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.2, 0.9, 0.6]) == pytest.approx([0.6, 1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_a_share_has_the_interval_of_the_ratio_of_paired_sums() -> None:
    part, whole = np.array([1.0, 0.0, 3.0, 1.0]), np.array([2.0, 1.0, 4.0, 1.0])
    low, high = ratio_interval(part, whole, np.arange(4))
    error = np.sqrt(((part - 0.625 * whole) ** 2).sum() / 8**2 * 4 / 3)
    assert (low, high) == pytest.approx((0.625 - 3.182446 * error, 0.625 + 3.182446 * error), rel=1e-6)
    assert ratio_interval(0.5 * whole, whole, np.arange(4)) == pytest.approx((0.5, 0.5))
    with pytest.raises(ValueError, match="share of 0"):
        ratio_interval(np.zeros(3), np.zeros(3), np.arange(3))


def test_no_items_or_unpaired_items_or_items_without_a_cluster_are_an_error() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        score_interval(np.array([]), np.array([]))
    with pytest.raises(ValueError, match="same items"):
        permutation_p(np.ones(3), np.ones(4), np.arange(3))
    with pytest.raises(ValueError, match="every item needs its cluster"):
        permutation_p(np.ones(3), np.zeros(3), np.arange(2))
