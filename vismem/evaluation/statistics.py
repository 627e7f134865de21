"""Uncertainty of scores over test items: intervals, the paired permutation test, Holm's correction. Pure functions.

Questions about one image are right and wrong together: an image with twenty of them says less than twenty images. All
figures therefore rest on clusters: `clusters` (n,) holds a label per item, and items with the same one count together.
Where each item is a cluster of its own they are the percentile bootstrap, McNemar's exact test and Wilson's interval.
They say nothing of the luck of a training run: for that, train again with other seeds.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.signal import convolve
from scipy.stats import binom, norm, t

from vismem.records import SIGNIFICANT, Difference, Interval

Scores = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64] | npt.NDArray[np.str_]

POWER = 0.8  # with which a difference of `Difference.detectable` is shown
COVERAGE = 1 - SIGNIFICANT  # of every interval
_CELLS = 4_000_000  # random indices drawn at once: 32 MB


def bootstrap_interval(scores: Scores, clusters: Labels, *, resamples: int, seed: int) -> Interval:
    """95 % percentile bootstrap interval of the mean of `scores` (n,), in their unit, `_widened` for the clusters.

    Items are drawn with replacement, n at a time, `resamples` times. The same seed and n draw the same items, so that
    intervals of several arms on the same items are comparable. ValueError for no items.
    """
    ends = _percentiles(_resampled_means(scores, resamples, seed))
    return _widened(ends, scores.mean(), scores - scores.mean(), clusters)


def share_interval(part: Scores, whole: Scores, clusters: Labels, *, resamples: int, seed: int) -> Interval:
    """95 % percentile bootstrap interval of sum(part) / sum(whole), both (n,), `_widened` for the clusters.

    Items are drawn, each with both figures. A draw in which the sum of `whole` is 0 says nothing and is left out;
    ValueError where all draws are.
    """
    parts, wholes = (_resampled_means(values, resamples, seed) for values in (part, whole))
    drawn = wholes != 0
    if not drawn.any():
        raise ValueError("the share of 0 is not defined")
    share = part.sum() / whole.sum()
    return _widened(_percentiles(parts[drawn] / wholes[drawn]), share, part - share * whole, clusters)


def score_interval(scores: Scores, clusters: Labels) -> Interval:
    """95 % interval of the mean of `scores` (n,), in percent: Wilson's, so that 5 right of 5 are not 100 to 100.

    Its n is the effective sample size, n over the design effect. Where nearly all is right or wrong the variance seen
    is too small: the effect is taken with two more clusters of the mean size, one all right and one all wrong. That
    leaves single questions their n, and gives clusters that are all alike the weight of a question each.
    """
    rights, sizes = _sums(scores / 100, clusters), _sums(np.ones_like(scores), clusters)
    n, count, mean = len(scores), len(sizes), scores.mean() / 100
    if count == 1 < n:
        return 0.0, 100.0
    rights, sizes = np.append(rights, (n / count, 0.0)), np.append(sizes, (n / count, n / count))
    share = rights.sum() / sizes.sum()
    effect = ((rights - share * sizes) ** 2).sum() / (share * (1 - share) * sizes.sum())
    spread = (norm.ppf((1 + COVERAGE) / 2) * _few(count, n)) ** 2 * effect / n
    middle = (mean + spread / 2) / (1 + spread)
    half = np.sqrt(spread * (mean * (1 - mean) + spread / 4)) / (1 + spread)
    return 100 * float(max(middle - half, 0.0)), 100 * float(min(middle + half, 1.0))


def permutation_p(arm: Scores, reference: Scores, clusters: Labels) -> float:
    """Two-sided exact p of the paired permutation test: the chance of so uneven a count if no arm were better.

    What is counted is the items that `arm` has better less those that it has worse. If no arm were better, the arms'
    answers to all questions of a cluster could be swapped, which turns the sign of its count. Of clusters of one item
    it is McNemar's exact test, with graded scores the exact sign test. 1.0 where no item differs.
    """
    if arm.shape != reference.shape:
        raise ValueError(f"arms must be scored on the same items: {arm.shape} against {reference.shape}")
    sums = np.rint(_sums(np.sign(arm - reference), clusters)).astype(np.int64)
    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    chances = np.ones(1)  # of the sum of the sizes that keep a plus
    for size, count in zip(sizes, counts, strict=True):
        kept = np.zeros(size * count + 1)
        kept[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = convolve(chances, kept)
    totals = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return float(np.clip(chances[np.abs(totals) >= abs(sums.sum())].sum(), 0.0, 1.0))


def paired_difference(arm: Scores, reference: Scores, clusters: Labels, *, resamples: int, seed: int) -> Difference:
    """Mean difference (arm - reference) on the same items (n,), scores in percent, with interval and p by clusters.

    The bootstrap draws items, each with both arms' scores, so the interval is that of the paired difference. Where no
    item is worse (or better) no draw has one, though as many may be as Wilson's interval of none allows: these, as far
    apart as can be, are added to that end in squares (Newcombe, 1998).
    `detectable` is the true difference that such data show with a chance of POWER; None where nothing varies.
    """
    p = permutation_p(arm, reference, clusters)  # refuses arms on other items, which numpy might broadcast
    difference, n = arm - reference, len(arm)
    farthest = max(100.0, np.abs(difference).max())  # beyond 100 where gains are compared, as the study does
    interval = bootstrap_interval(difference, clusters, resamples=resamples, seed=seed)
    delta, (low, high) = float(difference.mean()), interval
    unseen = farthest * score_interval(np.zeros(n), clusters)[1] / 100
    if not (difference < 0).any():
        low = delta - np.hypot(low - delta, unseen)
    if not (difference > 0).any():
        high = delta + np.hypot(high - delta, unseen)
    low, high = np.clip((low, high), -farthest, farthest)
    found = Difference(delta=delta, ci95=(float(low), float(high)), p=p)
    widening = _widening(difference - difference.mean(), clusters)
    if not np.ptp(difference) or np.isinf(widening):
        return found
    steps = t.ppf(((1 + COVERAGE) / 2, POWER), n - 1).sum() * widening
    return found.model_copy(update={"detectable": float(steps * difference.std(ddof=1) / np.sqrt(n))})


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of comparisons that stand side by side, so that the chance of any false one stays at the level."""
    order, count = np.argsort(ps), len(ps)
    adjusted = np.empty(count)
    adjusted[order] = np.minimum(np.maximum.accumulate(np.array(ps)[order] * np.arange(count, 0, -1)), 1.0)
    return [float(p) for p in adjusted]


def _resampled_means(scores: Scores, resamples: int, seed: int) -> Scores:
    """(resamples,) means of n items drawn with replacement: the same items for the same n and seed."""
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be a non-empty vector, not of shape {scores.shape}")
    rng = np.random.default_rng(seed)
    count, means = len(scores), np.empty(resamples)
    chunk = max(1, _CELLS // count)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        means[start : start + size] = scores[rng.integers(0, count, size=(size, count))].mean(axis=1)
    return means


def _percentiles(values: Scores) -> Scores:
    tail = 100 * (1 - COVERAGE) / 2
    return np.percentile(values, [tail, 100 - tail])


def _widened(ends: Scores, middle: float, residuals: Scores, clusters: Labels) -> Interval:
    """An interval of independent items, its ends moved away from `middle` by `_widening`; infinite of one cluster."""
    widening = _widening(residuals, clusters)
    if np.isinf(widening):
        return -np.inf, np.inf
    low, high = ends if widening == 1 else middle + widening * (ends - middle)
    return float(low), float(high)


def _widening(residuals: Scores, clusters: Labels) -> float:
    """How many times wider clusters make an interval: 1 where each item (n,) is alone, infinitely for a single cluster.

    The root of the design effect (Kish, 1965), the variance of the mean by the clusters' sums over that of independent
    items, times `_few`.
    """
    sums, n = _sums(residuals, clusters), len(residuals)
    count = len(sums)
    if 1 == count < n:
        return np.inf
    if count == n or not residuals.any():
        return 1.0
    effect = (sums**2).sum() / (residuals**2).sum() * (1 - 1 / n) / (1 - 1 / count)
    return float(np.sqrt(effect)) * _few(count, n)


def _few(clusters: int, items: int) -> float:
    """What Student's t of fewer degrees of freedom adds to an interval's width (Korn and Graubard, 1998)."""
    if clusters == items:
        return 1.0
    wide, narrow = t.ppf((1 + COVERAGE) / 2, (clusters - 1, items - 1))
    return float(wide / narrow)


def _sums(values: Scores, clusters: Labels) -> Scores:
    """(clusters,) sums of `values` (n,). ValueError for no items, and where one has no cluster."""
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"scores must be a non-empty vector, not of shape {values.shape}")
    if values.shape != clusters.shape:
        raise ValueError(f"every item needs its cluster: {values.shape} items, {clusters.shape} clusters")
    return np.bincount(np.unique(clusters, return_inverse=True)[1], weights=values).astype(np.float64)
