"""Continual learning in stages, each on other tasks (paper Table 8): what is left of the first stage's."""

from collections.abc import Mapping, Sequence

import pandas as pd

from recipes.study.claims import Answers, Values, compare
from recipes.study.figures import score_table
from vismem.records import VANILLA, VISMEM


def stage_figures(answers: Mapping[int, Sequence[Answers]], resamples: int) -> Values:
    """The first stage's test questions, answered after each stage; `answers` by seed and stage.

    {n; arms {arm: {scores: after each stage, lost: `compare` of the first with the last}}; less {arm: `compare` of what
    it lost with what VisMem lost}, for arms that are trained; changed: answers that vanilla, which is VisMem with
    memory and adapter off, gave otherwise after a later stage}.
    """
    stages = [score_table(dict(zip(answers, rows, strict=True))) for rows in zip(*answers.values(), strict=True)]
    first, last = stages[0], stages[-1]
    arms = {
        arm: {
            "scores": [float(stage[arm].mean()) for stage in stages],
            "lost": compare(pd.DataFrame({"first": first[arm], "last": last[arm]}), "first", "last", resamples),
        }
        for arm in first
    }
    lost = first - last
    less = {arm: compare(lost, arm, VISMEM, resamples) for arm in first if arm not in (VANILLA, VISMEM)}
    changed = sum(
        before.text != after.text
        for rows in answers.values()
        for stage in rows[1:]
        for before, after in zip(rows[0][VANILLA], stage[VANILLA], strict=True)
    )
    return {"n": len(first), "arms": arms, "less": less, "changed": changed}
