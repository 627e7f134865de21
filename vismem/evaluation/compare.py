"""`vismem compare`: arms whose answers other programs scored, compared question by question."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vismem.errors import UserError
from vismem.evaluation.scored import Scored, read_scored
from vismem.evaluation.statistics import holm, paired_difference, score_interval
from vismem.records import OVERALL, p_value

SCORE = "{:.1f} ({:.1f} to {:.1f})"
Arms = Mapping[str, Mapping[str, Scored]]  # arm -> its questions by id


def read_arms(files: Mapping[str, Sequence[Path]], metric: str | None = None, cluster: str | None = None) -> Arms:
    """The questions of every arm, in the first one's order.

    UserError as from `read_scored`, for a question that an arm has twice, and where arms answered other questions.
    """
    arms: dict[str, dict[str, Scored]] = {}
    for arm, paths in files.items():
        arms[arm] = {}
        for row in (row for path in paths for row in read_scored(path, metric, cluster)):
            if row.id in arms[arm]:
                raise UserError(f"{arm}: '{row.id}' is there twice: give the files of one run")
            arms[arm][row.id] = row
    first, *others = arms
    for arm in others:
        for lacking, having in ((arm, first), (first, arm)):
            if missing := [name for name in arms[having] if name not in arms[lacking]]:
                raise UserError(f"{lacking} lacks {len(missing)} questions of {having}, such as '{missing[0]}'")
        for name, row in arms[first].items():
            if arms[arm][name].reference != row.reference:
                raise UserError(f"'{name}' has another reference in {arm} than in {first}: compare the same data")
    return {arm: {name: rows[name] for name in arms[first]} for arm, rows in arms.items()}


def compare(arms: Arms, seed: int, resamples: int) -> list[dict[str, str]]:
    """The rows of a table: an arm's for each benchmark and overall, scores in percent and differences in points.

    `arms` as from `read_arms`. The first is what the others are compared with; p is Holm's over all comparisons. A
    question's cluster is what the file of any arm says, else the question.
    """
    first, *others = arms
    questions = [*arms[first].values()]
    told = {name: row.cluster for rows in arms.values() for name, row in rows.items() if row.cluster}
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
    said = {}
    for (cell, difference), p in zip(found.items(), holm([each.p for each in found.values()]), strict=True):
        judged, (low, high) = difference.model_copy(update={"p_holm": p}), difference.ci95
        said[cell] = f"{judged.delta:+.1f} ({low:+.1f} to {high:+.1f}), {p_value(p)}: {judged.outcome}"
    return [
        {
            "benchmark": name,
            "arm": arm,
            "n": str(mask.sum()),
            "clusters": str(len(np.unique(clusters[mask]))),
            "score": SCORE.format(scores[arm][mask].mean(), *score_interval(scores[arm][mask], clusters[mask])),
            f"minus {first}": said.get((name, arm), ""),
        }
        for name, mask in masks.items()
        for arm in arms
    ]
