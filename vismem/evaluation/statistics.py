"""Uncertainty of scores over test items: intervals, the paired permutation test, Holm's correction. Pure functions.

Questions about one image are right and wrong together: an image with twenty of them says less than twenty images. All
figures therefore rest on clusters: `clusters` (n,) holds a label per item, and items with the same one count together.
They say nothing of the luck of a training run: for that, train again with other seeds.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.signal import convolve
from scipy.stats import binom, t

from vismem.records import SIGNIFICANT, Difference, Interval

Scores = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64] | npt.NDArray[np.str_]

POWER = 0.8  # with which a difference of `Difference.detectable` is shown
FLIPS, _CELLS = 9999, 4_000_000  # drawn sign flips of graded scores, and random signs held at once


def ratio_interval(part: Scores, whole: Scores, clusters: Labels) -> Interval:
    """95 % interval of sum(part) / sum(whole), all (n,); infinite for a single cluster. ValueError where `whole` is 0.

    Student's t on the clusters' sums, linearised, with a degree of freedom less than there are clusters. Of the usual
    methods it is the one that keeps its coverage down to ten clusters.
    """
    ratio, error, count = _estimate(part, whole, clusters)
    half = _quantile(1 - SIGNIFICANT / 2, count) * error if count > 1 else np.inf
    return ratio - half, ratio + half


def score_interval(scores: Scores, clusters: Labels) -> Interval:
    """95 % interval of the mean of `scores` (n,), in percent: Wilson's, so that 5 right of 5 are not 100 to 100.

    Its n is the effective sample size, as many independent questions as would have the clusters' variance (Korn and
    Graubard, 1998), and its quantile is t's. Where nearly all is right or wrong the variance seen is too small: it is
    taken with two more clusters of the mean size, one all right and one all wrong. Single questions keep their n by it.
    """
    rights, sizes = _sums(scores / 100, clusters), _sums(np.ones_like(scores), clusters)
    count, mean = len(sizes), rights.sum() / sizes.sum()
    if count == 1:
        return 0.0, 100.0
    more = np.append(rights, (sizes.mean(), 0.0)), np.append(sizes, (sizes.mean(), sizes.mean()))
    share, variance = _ratio(*more)
    effective = share * (1 - share) / variance * count / (count + 2)
    spread = _quantile(1 - SIGNIFICANT / 2, count) ** 2 / effective
    middle = (mean + spread / 2) / (1 + spread)
    half = np.sqrt(spread * (mean * (1 - mean) + spread / 4)) / (1 + spread)
    return 100 * float(max(middle - half, 0.0)), 100 * float(min(middle + half, 1.0))


def permutation_p(arm: Scores, reference: Scores, clusters: Labels) -> float:
    """Two-sided p of the paired permutation test: how often the arms' sums are as far apart with clusters swapped.

    Where neither arm is better, swapping both answers to all questions of a cluster changes nothing but the sign of its
    difference. Exact for scores that are right or wrong, where it is McNemar's exact test if each cluster is one
    question; of graded scores FLIPS sign flips are drawn. 1.0 where no item differs.
    """
    if arm.shape != reference.shape:
        raise ValueError(f"arms must be scored on the same items: {arm.shape} against {reference.shape}")
    difference = arm - reference
    largest = np.abs(difference).max(initial=0.0)
    if largest == 0:
        return 1.0
    differences = difference / largest
    sums = _sums(differences, clusters)
    if np.isin(differences, (-1, 0, 1)).all():
        return _exact_p(np.rint(sums).astype(np.int64))
    return _drawn_p(sums)


def _exact_p(sums: npt.NDArray[np.int64]) -> float:
    """The share of all sign flips of `sums`, whole numbers, whose total is as far from 0; by their distribution."""
    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    chances = np.ones(1)  # of the sum of the sizes that keep a plus
    for size, count in zip(sizes, counts, strict=True):
        kept = np.zeros(size * count + 1)
        kept[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = convolve(chances, kept)
    totals = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return float(np.clip(chances[np.abs(totals) >= abs(sums.sum())].sum(), 0.0, 1.0))


def _drawn_p(sums: Scores) -> float:
    rng, far, seen = np.random.default_rng(0), abs(sums.sum()) * (1 - 1e-9), 1  # what was observed is one of them
    chunk = max(1, _CELLS // len(sums))
    for start in range(0, FLIPS, chunk):
        signs = rng.choice((-1.0, 1.0), size=(min(chunk, FLIPS - start), len(sums)))
        seen += int((np.abs(signs @ sums) >= far).sum())
    return seen / (FLIPS + 1)


def paired_difference(arm: Scores, reference: Scores, clusters: Labels) -> Difference:
    """Mean difference (arm - reference) on the same items (n,), scores in percent, with interval and p by clusters.

    `detectable` is the true difference that such data show with a chance of POWER; None where nothing varies.
    """
    p = permutation_p(arm, reference, clusters)  # refuses arms on other items, which numpy might broadcast
    difference, ones = arm - reference, np.ones_like(arm)
    low, high = np.clip(ratio_interval(difference, ones, clusters), -100, 100)
    delta, error, count = _estimate(difference, ones, clusters)
    steps = sum(_quantile(chance, count) for chance in (1 - SIGNIFICANT / 2, POWER))
    return Difference(delta=delta, ci95=(float(low), float(high)), p=p, detectable=steps * error if error else None)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of comparisons that stand side by side, so that the chance of any false one stays at the level."""
    order, count = np.argsort(ps), len(ps)
    adjusted = np.empty(count)
    adjusted[order] = np.minimum(np.maximum.accumulate(np.array(ps)[order] * np.arange(count, 0, -1)), 1.0)
    return [float(p) for p in adjusted]


def _estimate(part: Scores, whole: Scores, clusters: Labels) -> tuple[float, float, int]:
    """sum(part) / sum(whole), its standard error (0 for one cluster), and the number of clusters."""
    parts, wholes = (_sums(values, clusters) for values in (part, whole))
    (ratio, variance), count = _ratio(parts, wholes), len(parts)
    return ratio, float(np.sqrt(variance * count / (count - 1))) if count > 1 else 0.0, count


def _ratio(parts: Scores, wholes: Scores) -> tuple[float, float]:
    """sum(parts) / sum(wholes) of the clusters' sums, and its linearised variance, not corrected for their number."""
    total = wholes.sum()
    if total == 0:
        raise ValueError("the share of 0 is not defined")
    ratio = parts.sum() / total
    return float(ratio), float(((parts - ratio * wholes) ** 2).sum() / total**2)


def _sums(values: Scores, clusters: Labels) -> Scores:
    """(clusters,) sums of `values` (n,). ValueError for no items, and where one has no cluster."""
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"scores must be a non-empty vector, not of shape {values.shape}")
    if values.shape != clusters.shape:
        raise ValueError(f"every item needs its cluster: {values.shape} items, {clusters.shape} clusters")
    return np.bincount(np.unique(clusters, return_inverse=True)[1], weights=values).astype(np.float64)


def _quantile(chance: float, clusters: int) -> float:
    return float(t.ppf(chance, clusters - 1))
