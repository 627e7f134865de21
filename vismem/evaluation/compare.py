"""`vismem compare`: arms whose answers other programs scored, compared question by question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from vismem.errors import UserError
from vismem.evaluation.panels import to_svg
from vismem.evaluation.plots import interval_panel, short_name
from vismem.evaluation.report import SCRIPT, Cards
from vismem.evaluation.scored import Scored, read_scored
from vismem.evaluation.statistics import holm, paired_difference, score_interval
from vismem.pages import TIPS, storable
from vismem.records import OVERALL, Difference, Interval, p_value

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


@dataclass(frozen=True)
class Row:
    """An arm's score on a benchmark in percent, and its difference from the first arm in points; none for that one."""

    benchmark: str
    arm: str
    n: int
    clusters: int
    score: float
    interval: Interval
    difference: Difference | None


def compare(arms: Arms, seed: int, resamples: int) -> list[Row]:
    """A row for each benchmark and arm, and for each arm overall.

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
    corrected = holm([each.p for each in found.values()])
    judged = {
        cell: each.model_copy(update={"p_holm": p}) for (cell, each), p in zip(found.items(), corrected, strict=True)
    }
    return [
        Row(
            name,
            arm,
            int(mask.sum()),
            len(np.unique(clusters[mask])),
            float(scores[arm][mask].mean()),
            score_interval(scores[arm][mask], clusters[mask]),
            judged.get((name, arm)),
        )
        for name, mask in masks.items()
        for arm in arms
    ]


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The rows as texts."""
    return [
        {
            "benchmark": row.benchmark,
            "arm": row.arm,
            "n": str(row.n),
            "clusters": str(row.clusters),
            "score": "{:.1f} ({:.1f} to {:.1f})".format(row.score, *row.interval),
            f"minus {rows[0].arm}": in_words(row.difference) if row.difference else "",
        }
        for row in rows
    ]


def in_words(difference: Difference) -> str:
    """The difference, its interval, its p and what these show."""
    low, high = difference.ci95
    return f"{difference.delta:+.1f} ({low:+.1f} to {high:+.1f}), {p_value(difference.judged_p)}: {difference.outcome}"


def render(arms: Arms, rows: Sequence[Row], seed: int) -> str:
    """A page with the rows as charts and table, and the answers; of very many as many as fit, drawn at random."""
    first = rows[0].arm
    tasks = [question.benchmark for question in arms[first].values()]
    cards = Cards({arm: [*answers.values()] for arm, answers in arms.items()}, tasks)
    ends = [end for row in rows for end in row.interval]
    by_benchmark: dict[str, list[Row]] = {}
    for row in rows:
        by_benchmark.setdefault(row.benchmark, []).append(row)
    panels = [
        interval_panel(
            f"{short_name(name)} (n = {of[0].n})", {row.arm: (row.score, row.interval) for row in of}, first, ends
        )
        for name, of in by_benchmark.items()
    ]
    page: str = cards.environment.get_template("compare.html.j2").render(
        rows=by_benchmark,
        arms=[*arms],
        n=len(tasks),
        charts=[(panel.words, to_svg(panel)) for panel in panels],
        cards=cards.every(seed),
        tasks=sorted({*tasks}),
        script=Markup(TIPS + SCRIPT.read_text()),
    )
    return storable(page)
