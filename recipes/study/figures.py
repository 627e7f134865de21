"""What several seeds' evaluations show together: arms, claims and transfer as plain values. Pure; scores in percent.

A pooled interval is over the questions of all seeds. The spread over seeds is reported beside it, since each seed also
trains another base and another memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from vismem.evaluation.arms import label
from vismem.evaluation.metrics import is_yes_no, summarise
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.statistics import paired_difference
from vismem.records import VANILLA, VISMEM

RANDOM = ("random_25", "random_50", "random_75", "random_100")
ONLY = ("short_only", "long_only")

Values = dict[str, Any]
Claims = Mapping[str, tuple[Sequence[str], Sequence[str]]]
Answers = Mapping[str, Sequence[Prediction]]  # by arm: the same questions in the same order, vanilla among the arms

# a claim is that one arm, or the mean of several, scores above another: {text: (above, below)}
ORDER = {  # of the paper's Tables 3 and 9
    "VisMem is above vanilla": ((VISMEM,), (VANILLA,)),
    "VisMem is above short memory only": ((VISMEM,), ("short_only",)),
    "VisMem is above long memory only": ((VISMEM,), ("long_only",)),
    "one kind of memory only (mean of both) is above random invocation (mean of the rates)": (ONLY, RANDOM),
    "VisMem is above random invocation (mean of the rates)": ((VISMEM,), RANDOM),
    "random invocation (mean of the rates) is above vanilla": (RANDOM, (VANILLA,)),
    "more is not better: random 25 to 75 % (mean) is above every delimiter": (RANDOM[:3], RANDOM[3:]),
}
CONTENT = {  # is it the memory's content that helps?
    "VisMem is above the same with another row's memories": ((VISMEM,), ("shuffled",)),
    "VisMem is above the same with noise for memories": ((VISMEM,), ("noise",)),
    "VisMem is above the same with short and long swapped": ((VISMEM,), ("swapped",)),
    "VisMem is above showing the image's tokens once more": ((VISMEM,), ("relook",)),
}


def study_figures(
    answers: Mapping[int, Answers], seconds: Mapping[int, Mapping[str, float]], baselines: Sequence[str], resamples: int
) -> Values:
    """The figures of all arms, tasks and claims; `answers` and `seconds` (per question, by arm) are by seed.

    arms {arm: `arm_figures`, seconds (mean of the seeds), overhead (over vanilla, by seed)}; pooled: `summarise` of all
    questions; yes_no_tasks: those whose every question is answered yes or no; claims {group: `judge`}.
    """
    scores, times = score_table(answers), pd.DataFrame(seconds)
    mean_seconds, overhead = times.mean(axis=1).to_dict(), times / times.loc[VANILLA] - 1
    arms = {
        arm: {**figures, "seconds": mean_seconds[arm], "overhead": overhead.loc[arm].tolist()}
        for arm, figures in arm_figures(scores, resamples).items()
    }
    pooled = {  # seeds ask other questions under the same ids
        arm: [replace(a, id=f"{seed}/{a.id}") for seed, rows in answers.items() for a in rows[arm]] for arm in arms
    }
    asked = pooled[VANILLA]
    claims: dict[str, Claims] = {"order": ORDER, "content": CONTENT, "baselines": vismem_above(baselines)}
    return {
        "arms": arms,
        "pooled": summarise(pooled, mean_seconds, seed=min(answers), resamples=resamples),
        "yes_no_tasks": sorted({a.task for a in asked} - {a.task for a in asked if not is_yes_no(a)}),
        "claims": {name: judge(wanted, scores, resamples) for name, wanted in claims.items()},
    }


def transfer_figures(answers: Mapping[int, Answers], trained: Sequence[str], resamples: int) -> Values:
    """Figures of models trained on half of the tasks: on the tasks `trained` on, and on the others.

    {tasks, halves {"trained" or "untrained": {n, arms (`arm_figures`), claims}}}; a half without questions is left out.
    """
    scores = score_table(answers)
    known = scores.index.get_level_values("task").isin(trained)
    claims = vismem_above([arm for arm in scores if arm not in (VANILLA, VISMEM)])
    halves = {
        name: {"n": len(half), "arms": arm_figures(half, resamples), "claims": judge(claims, half, resamples)}
        for name, half in (("trained", scores[known]), ("untrained", scores[~known]))
        if len(half)
    }
    return {"tasks": list(trained), "halves": halves}


def score_table(answers: Mapping[int, Answers]) -> pd.DataFrame:
    """(questions, arms) scores in percent; the index is each question's seed and task."""
    tables = {}
    for seed, by_arm in answers.items():
        scores = {arm: [100 * answer.score for answer in rows] for arm, rows in by_arm.items()}
        tables[seed] = pd.DataFrame(scores, index=pd.Index([a.task for a in by_arm[VANILLA]], name="task"))
    return pd.concat(tables, names=["seed"])


def arm_figures(scores: pd.DataFrame, resamples: int) -> Values:
    """{arm: {seeds {seed: score}, mean (of the seeds), spread, gain}}.

    `spread` is the sample standard deviation over seeds, None for one seed. `gain` is `compare` with vanilla, None for
    vanilla.
    """
    figures: Values = {}
    for arm in scores:
        seeds = {int(seed): float(rows.mean()) for seed, rows in scores[arm].groupby(level="seed")}
        spread = float(pd.Series(seeds).std()) if len(seeds) > 1 else None
        gain = compare(scores, [arm], [VANILLA], resamples) if arm != VANILLA else None
        figures[arm] = {"seeds": seeds, "mean": sum(seeds.values()) / len(seeds), "spread": spread, "gain": gain}
    return figures


def judge(claims: Claims, scores: pd.DataFrame, resamples: int) -> list[Values]:
    """`compare` for every claim whose arms were all run, each with its `text`."""
    return [
        {"text": text, **compare(scores, above, below, resamples)}
        for text, (above, below) in claims.items()
        if {*above, *below} <= set(scores)
    ]


def vismem_above(arms: Sequence[str]) -> Claims:
    """VisMem compared with each of the arms."""
    return {f"VisMem is above {label(arm)}": ((VISMEM,), (arm,)) for arm in arms}


def compare(scores: pd.DataFrame, above: Sequence[str], below: Sequence[str], resamples: int) -> Values:
    """The paired difference {delta, ci95, p} in points of two sides, each the mean of its arms.

    {pooled, seeds {seed: ...}, holds, reversed}: `holds` counts the seeds in which the 95 % interval is above 0,
    `reversed` those in which it is below.
    """

    def difference(rows: pd.DataFrame, seed: int) -> Values:
        sides = (rows[list(side)].to_numpy().mean(axis=1) for side in (above, below))
        return paired_difference(*sides, resamples=resamples, seed=seed).model_dump(mode="json")

    seeds = {int(seed): difference(rows, int(seed)) for seed, rows in scores.groupby(level="seed")}
    return {
        "pooled": difference(scores, min(seeds)),
        "seeds": seeds,
        "holds": sum(found["ci95"][0] > 0 for found in seeds.values()),
        "reversed": sum(found["ci95"][1] < 0 for found in seeds.values()),
    }
