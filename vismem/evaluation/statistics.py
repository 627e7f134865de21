"""Uncertainty of scores over test items: bootstrap intervals, paired differences, exact McNemar. Pure functions.

All intervals are about the choice of test items. They say nothing of the luck of a training run: for that, train again
with other seeds.
"""

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from vismem.records import Difference

Scores = npt.NDArray[np.float64]

_CELLS = 4_000_000  # random indices drawn at once: 32 MB


def bootstrap_interval(scores: Scores, *, resamples: int, seed: int, coverage: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `scores` (n,), in the unit of the scores.

    Items are drawn with replacement, n at a time, `resamples` times. The same seed and n draw the same items, so that
    intervals of several arms on the same items are comparable. ValueError for no items.
    """
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be a non-empty vector, not of shape {scores.shape}")
    return _percentiles(_resampled_means(scores, resamples, seed), coverage)


def share_interval(part: Scores, whole: Scores, *, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval (95 %) of sum(part) / sum(whole), both (n,).

    Items are drawn, each with both figures. A draw in which the sum of `whole` is 0 says nothing and is left out;
    ValueError where all draws are.
    """
    parts, wholes = (_resampled_means(values, resamples, seed) for values in (part, whole))
    drawn = wholes != 0
    if not drawn.any():
        raise ValueError("the share of 0 is not defined")
    return _percentiles(parts[drawn] / wholes[drawn], 0.95)


def _resampled_means(scores: Scores, resamples: int, seed: int) -> Scores:
    """(resamples,) means of n items drawn with replacement: the same items for the same n and seed."""
    rng = np.random.default_rng(seed)
    count, means = len(scores), np.empty(resamples)
    chunk = max(1, _CELLS // count)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        means[start : start + size] = scores[rng.integers(0, count, size=(size, count))].mean(axis=1)
    return means


def _percentiles(values: Scores, coverage: float) -> tuple[float, float]:
    tail = 100 * (1 - coverage) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def mcnemar(arm: Scores, reference: Scores) -> float:
    """Two-sided exact McNemar p: the chance of so uneven a split of the items on which the two differ.

    Of b items that only `arm` has right and c that only `reference` has right, b is binomial(b + c, 1/2) if neither is
    better. With graded scores this is the exact sign test. 1.0 where no item differs.
    """
    if arm.shape != reference.shape:
        raise ValueError(f"arms must be scored on the same items: {arm.shape} against {reference.shape}")
    better, worse = int((arm > reference).sum()), int((arm < reference).sum())
    if better + worse == 0:
        return 1.0
    return float(binomtest(better, better + worse, 0.5).pvalue)


def paired_difference(arm: Scores, reference: Scores, *, resamples: int, seed: int) -> Difference:
    """Mean difference (arm - reference) on the same items (n,) in the same order, with 95 % interval and McNemar's p.

    The bootstrap draws items, each with both arms' scores, so the interval is that of the paired difference.
    """
    p = mcnemar(arm, reference)  # refuses arms on other items, which numpy might broadcast
    difference = arm - reference
    interval = bootstrap_interval(difference, resamples=resamples, seed=seed)
    return Difference(delta=float(difference.mean()), ci95=interval, p=p)
