"""What memory does by its number, by the need of a question, and against the best that a choice could do. Pure.

All of it from predictions of the arms; scores in percent.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from recipes.study.claims import Answers, Values, clusters_of, compare, needs_of
from vismem.evaluation import panels
from vismem.evaluation.arms import label
from vismem.evaluation.statistics import score_interval, share_interval
from vismem.records import VANILLA, VISMEM

RANDOM = ("random_25", "random_50", "random_100")  # rates of random invocation
PLACEMENTS = {  # of memories: the arms that have ever more of them
    VISMEM: ("no_memory", "vismem@1", "vismem@2", VISMEM),
    "random": ("no_memory", *RANDOM),
    "forced_short": ("no_memory", "forced_short@1", "forced_short@2", "forced_short@3", "forced_short"),
    "forced_long": ("no_memory", "forced_long@1", "forced_long@2", "forced_long"),
}
CHOICES = ("no_memory", "as_short", "as_long")  # what the learned policy chooses among
KINDS_OF_NEED = ("coarse", "detail", "compute")
COLOURS = dict(zip(PLACEMENTS, (panels.BLUE, panels.GREY, "#009E73", panels.ORANGE), strict=True))


def mean_memories(answers: Mapping[int, Answers]) -> dict[str, float]:
    """Memories per answer by arm, over the questions of all seeds."""
    arms = next(iter(answers.values()))
    return {
        arm: float(np.mean([len(answer.invocations) for rows in answers.values() for answer in rows[arm]]))
        for arm in arms
    }


def checked_memories(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Memories per answer by arm, mean over runs, on validation questions: of `validation` in stage II's metrics."""
    return {
        arm: float(np.mean([run[arm]["invocations_short"] + run[arm]["invocations_long"] for run in runs]))
        for arm in runs[0]
    }


def nearest_rate(memories: Mapping[str, float]) -> str:
    """The rate of random invocation whose number of memories is nearest to VisMem's; the scores play no part."""
    return min(RANDOM, key=lambda arm: abs(memories[arm] - memories[VISMEM]))


def lines(scores: pd.DataFrame, memories: Mapping[str, float]) -> dict[str, list[Values]]:
    """{placement: [{arm, memories (mean per answer), score, ci95}]}: each placement's score as its memories grow.

    All begin at `no_memory`; a placement of which nothing else was run is left out.
    """
    found = {}
    for placement, arms in PLACEMENTS.items():
        run = [arm for arm in arms if arm in scores]
        if run[:1] == ["no_memory"] and len(run) > 1:
            found[placement] = [
                {
                    "arm": arm,
                    "memories": memories[arm],
                    "score": float(scores[arm].mean()),
                    "ci95": score_interval(scores[arm].to_numpy(), clusters_of(scores)),
                }
                for arm in run
            ]
    return found


def lines_plot(placements: Mapping[str, Sequence[Values]]) -> bytes:
    """Accuracy over the mean number of memories per answer, a line per placement, with 95 % intervals, as PNG."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for placement, points in placements.items():
        x, y = [point["memories"] for point in points], [point["score"] for point in points]
        spans = np.abs(np.array([point["ci95"] for point in points]).T - np.array(y))
        axes.errorbar(
            x, y, spans, color=COLOURS[placement], label=label(placement), marker="o", markersize=4, capsize=2
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=panels.RULE)
    axes.set_xlim(left=-0.1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("mean number of memories per answer")
    axes.set_ylabel("score (%), with the 95 % interval")
    axes.legend(frameon=False)
    return panels.to_png(figure)


def needs(scores: pd.DataFrame, resamples: int) -> dict[str, Values]:
    """{need: {n, arms {arm: score}, gains {arm: `compare` with vanilla}}} of the needs whose tasks were asked."""
    found, asked = {}, needs_of(scores)
    for need in KINDS_OF_NEED:
        rows = scores[asked == need]
        if len(rows):
            gains = {arm: compare(rows, arm, VANILLA, resamples) for arm in rows if arm != VANILLA}
            found[need] = {"n": len(rows), "arms": rows.mean().to_dict(), "gains": gains}
    return found


def oracle(scores: pd.DataFrame, resamples: int) -> Values | None:
    """How far the learned choice of kind gets towards the best of none, all short and all long, question by question.

    {arms {arm: score}, mean (of the three), best (arm), learned, oracle, share, share_ci95, seeds {seed: {share,
    share_ci95}}, over_best (`compare` of learned with the best single one)}. `share`: of the way from the mean of the
    three to the oracle, in percent; None where the three never differ. None where an arm was not run.
    """
    if not {VISMEM, *CHOICES} <= set(scores):
        return None
    means = {arm: float(scores[arm].mean()) for arm in CHOICES}
    best = max(means, key=means.__getitem__)
    return {
        "arms": means,
        "best": best,
        "learned": float(scores[VISMEM].mean()),
        "oracle": float(scores[list(CHOICES)].max(axis=1).mean()),
        **_share(scores, resamples),
        "seeds": {int(seed): _share(rows, resamples) for seed, rows in scores.groupby(level="seed")},
        "over_best": compare(scores, VISMEM, best, resamples),
    }


def _share(scores: pd.DataFrame, resamples: int) -> Values:
    three = scores[list(CHOICES)]
    way, gone = (side.to_numpy() - three.mean(axis=1).to_numpy() for side in (three.max(axis=1), scores[VISMEM]))
    found: Values = {"mean": float(three.to_numpy().mean()), "share": None, "share_ci95": None}
    if way.any():
        found["share"] = float(100 * gone.sum() / way.sum())
        found["share_ci95"] = share_interval(100 * gone, way, clusters_of(scores), resamples=resamples, seed=0)
    return found
