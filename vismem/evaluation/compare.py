"""`vismem compare`: arms whose answers other programs scored, compared question by question."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vismem.errors import UserError
from vismem.evaluation.scored import Scored, read_scored
from vismem.evaluation.statistics import holm, paired_difference, score_interval
from vismem.records import OVERALL, Difference, Interval, p_value


def read_arms(
    files: Mapping[str, Sequence[Path]], metric: str | None = None, cluster: str | None = None
) -> dict[str, dict[str, Scored]]:
    """Arm -> its questions by id, in the first arm's order.

    UserError as from `read_scored`, for a question that an arm has twice, and where arms answered other questions.
    """
    arms: dict[str, dict[str, Scored]] = {}
    for arm, paths in files.items():
        rows = [row for path in paths for row in read_scored(path, metric, cluster)]
        again = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
        if again:
            raise UserError(f"{arm}: '{again[0]}' is there {_more(again)}twice: give one file of each run")
        arms[arm] = {row.id: row for row in rows}
    first, *others = arms
    for arm in others:
        for lacking, having in ((arm, first), (first, arm)):
            if missing := [name for name in arms[having] if name not in arms[lacking]]:
                raise UserError(f"{lacking} has no answer to '{missing[0]}' {_more(missing)}which {having} has")
        for name, row in arms[first].items():
            if arms[arm][name].reference != row.reference:
                raise UserError(f"'{name}' has another reference in {arm} than in {first}: compare the same data")
    return {arm: {name: rows[name] for name in arms[first]} for arm, rows in arms.items()}


def compare(arms: Mapping[str, Mapping[str, Scored]], seed: int, resamples: int) -> list[dict[str, str]]:
    """The rows of a table: an arm's for each benchmark and overall, scores in percent and differences in points.

    `arms` as from `read_arms`. The first is what the others are compared with; p is Holm's over all comparisons.
    """
    first, *others = arms
    questions = [*arms[first].values()]
    told = told_clusters(arms)
    clusters = np.array([told.get(row.id, row.id) for row in questions])
    scores = {arm: np.array([100 * row.score for row in rows.values()]) for arm, rows in arms.items()}
    names = sorted({row.benchmark for row in questions})
    masks = {name: np.array([row.benchmark == name for row in questions]) for name in names if len(names) > 1}
    masks[OVERALL] = np.ones(len(questions), dtype=bool)
    found = {
        (name, arm): paired_difference(
            scores[arm][mask], scores[first][mask], clusters[mask], seed=seed, resamples=resamples
        )
        for name, mask in masks.items()
        for arm in others
    }
    adjusted = holm([difference.p for difference in found.values()]) if found else []
    found = {
        cell: difference.model_copy(update={"p_holm": p})
        for (cell, difference), p in zip(found.items(), adjusted, strict=True)
    }
    return [
        {
            "benchmark": name,
            "arm": arm,
            "n": str(mask.sum()),
            "clusters": str(len(np.unique(clusters[mask]))),
            "score": f"{scores[arm][mask].mean():.1f} {_span(score_interval(scores[arm][mask], clusters[mask]), '')}",
            f"minus {first}": _said(found.get((name, arm))),
        }
        for name, mask in masks.items()
        for arm in arms
    ]


def told_clusters(arms: Mapping[str, Mapping[str, Scored]]) -> dict[str, str]:
    """Each question's cluster, where a file of any arm says it."""
    return {name: row.cluster for rows in arms.values() for name, row in rows.items() if row.cluster}


def _said(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return (
        f"{difference.delta:+.1f} {_span(difference.ci95, '+')}, {p_value(difference.judged_p)}: {difference.outcome}"
    )


def _span(interval: Interval, sign: str) -> str:
    return "({:{s}.1f} to {:{s}.1f})".format(*interval, s=sign)


def _more(names: Sequence[str]) -> str:
    return f"and {len(names) - 1} more " if len(names) > 1 else ""
