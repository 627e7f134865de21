"""What several seeds' evaluations show together: arms, claims and transfer as plain values. Pure; scores in percent.

A pooled interval is over the questions of all seeds. The spread over seeds is reported beside it, since each seed also
trains another base and another memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from recipes.study import budgets
from recipes.study.claims import (
    CONTENT,
    PLAN_IDS,
    TRANSFER_IDS,
    by_need,
    compare,
    judge,
    order,
    vismem_above,
    whole_order,
)
from vismem.evaluation.metrics import is_yes_no, summarise
from vismem.evaluation.predictions import Prediction
from vismem.records import VANILLA, VISMEM

Values = dict[str, Any]
Answers = Mapping[str, Sequence[Prediction]]  # by arm: the same questions in the same order, vanilla among the arms


def study_figures(
    answers: Mapping[int, Answers], seconds: Mapping[int, Mapping[str, float]], baselines: Sequence[str], resamples: int
) -> Values:
    """The figures of all arms, tasks and claims; `answers` and `seconds` (per question, by arm) are by seed.

    arms {arm: `arm_figures`, seconds (mean of the seeds), overhead (over vanilla, by seed)}; pooled: `summarise` of all
    questions; yes_no_tasks: those whose every question is answered yes or no; claims {group: `judge`}; whole_order (the
    plan's M4); budgets, needs and oracle: `recipes.study.budgets`.
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
    memories = budgets.mean_memories(answers)
    claims = {
        "order": order(*budgets.random_rates(scores, memories)),
        "need": by_need(),
        "content": CONTENT,
        "baselines": vismem_above(baselines, PLAN_IDS),
    }
    judged = {name: judge(wanted, scores, resamples) for name, wanted in claims.items()}
    return {
        "arms": arms,
        "pooled": summarise(pooled, mean_seconds, seed=min(answers), resamples=resamples),
        "yes_no_tasks": sorted({a.task for a in asked} - {a.task for a in asked if not is_yes_no(a)}),
        "claims": judged,
        "whole_order": whole_order(judged["order"]),
        "budgets": budgets.lines(scores, memories, resamples),
        "needs": budgets.needs(scores, resamples),
        "oracle": budgets.oracle(scores, resamples),
    }


def transfer_figures(answers: Mapping[int, Answers], trained: Sequence[str], resamples: int) -> Values:
    """Figures of models trained on half of the tasks: on the tasks `trained` on, and on the others.

    {tasks, halves {"trained" or "untrained": {n, arms (`arm_figures`), claims}}}; a half without questions is left out.
    """
    scores = score_table(answers)
    known = scores.index.get_level_values("task").isin(trained)
    others = [arm for arm in scores if arm != VISMEM]
    halves = {
        name: {
            "n": len(half),
            "arms": arm_figures(half, resamples),
            "claims": judge(vismem_above(others, ids), half, resamples),
        }
        for name, half, ids in (("trained", scores[known], {}), ("untrained", scores[~known], TRANSFER_IDS))
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
