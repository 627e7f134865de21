"""Scores by benchmark, their macro average, and the figures that HallusionBench counts by. Pure; all are in percent.

A benchmark is what a sample's `source` names. Rows that `validate` set apart are no part of a score, but are counted.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vismem.evaluation.predictions import Prediction
from vismem.evaluation.statistics import Scores

HALLUSION = "HallusionBench"  # its rows' index: category_subcategory_visual_set_figure_question


def by_benchmark(
    items: Sequence[Prediction], scores: Mapping[str, Scores], set_apart: Mapping[str, int]
) -> dict[str, Any]:
    """Benchmark -> {n, set_apart, arms: {arm: accuracy}, figures: {arm: {name: figure}}}, by name.

    `scores`: arm -> (n,) of the items. A benchmark of which every row was set apart has n = 0 and no scores.
    """
    found: dict[str, Any] = {}
    for name in sorted({item.source for item in items} | {*set_apart}):
        mask = np.array([item.source == name for item in items], dtype=bool)
        own = [item.id for item in items if item.source == name]
        found[name] = {
            "n": len(own),
            "set_apart": set_apart.get(name, 0),
            "arms": {arm: float(values[mask].mean()) for arm, values in scores.items()} if own else {},
            "figures": {arm: hallusion(own, values[mask]) for arm, values in scores.items()}
            if own and name == HALLUSION
            else {},
        }
    return found


def macro(benchmarks: Mapping[str, Any], arms: Iterable[str]) -> dict[str, float]:
    """Arm -> the mean of `score_of` over the benchmarks with items, each of the same weight."""
    return {arm: float(np.mean([score_of(b, arm) for b in benchmarks.values() if b["n"]])) for arm in arms}


def score_of(benchmark: Mapping[str, Any], arm: str) -> float:
    """What a benchmark is reported by: HallusionBench by the mean of its three figures, others by the accuracy."""
    return float(benchmark["figures"].get(arm, {}).get("mean", benchmark["arms"][arm]))


def hallusion(ids: Sequence[str], scores: Scores) -> dict[str, float]:
    """HallusionBench's aAcc, fAcc, qAcc and their mean: per answer, per figure and per question.

    A figure counts where all questions about it are answered correctly, a question where it is for all of its figures
    (Guan et al., CVPR 2024). None of them where an id is not made of the six parts.
    """
    parts = [name.removeprefix(f"{HALLUSION}-").split("_") for name in ids]
    if any(len(part) != 6 for part in parts):
        return {}
    table = pd.DataFrame(parts, columns=["category", "subcategory", "visual", "set", "figure", "question"])
    accuracies = {"aAcc": float(scores.mean())}
    for name, counted in (("fAcc", "figure"), ("qAcc", "question")):
        together = table.assign(score=scores).groupby(["category", "subcategory", "set", counted])["score"]
        accuracies[name] = float(together.min().mean())
    return accuracies | {"mean": float(np.mean([*accuracies.values()]))}


def task_names(items: Sequence[Prediction]) -> list[str]:
    """The items' tasks; those of several benchmarks that have one name are told apart by the benchmark's."""
    benchmarks = Counter(task for task, _ in {(item.task, item.source) for item in items})
    return [f"{item.source}: {item.task}" if benchmarks[item.task] > 1 else item.task for item in items]
