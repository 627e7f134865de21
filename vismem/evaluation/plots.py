"""The plots of an evaluation as PNG bytes, and the small tables behind them for `dvc plots` (paper Figures 5 and 9)."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vismem.evaluation.arms import VANILLA, VISMEM, label
from vismem.evaluation.metrics import CAPABILITIES, OVERALL
from vismem.evaluation.predictions import Prediction
from vismem.generation.types import MemoryKind

# Okabe and Ito's colours: they stay apart for colour-blind readers.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7F7F7F"
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#000000")
KIND_COLOURS = {MemoryKind.SHORT: BLUE, MemoryKind.LONG: ORANGE}
BINS = 10  # of the relative position


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """One colour an arm: vanilla grey, VisMem blue, the others in turn."""
    others = [arm for arm in arms if arm not in (VANILLA, VISMEM)]
    colours = {arm: OTHERS[place % len(OTHERS)] for place, arm in enumerate(others)}
    return {VANILLA: GREY, VISMEM: BLUE, **colours}


def score_plot(metrics: Mapping[str, Any]) -> bytes:
    """Scores by capability and arm, with 95 % intervals."""
    arms, groups = list(metrics["arms"]), _groups(metrics)
    colours = arm_colours(arms)
    figure, axes = _figure(8.4, 3.8)
    for place, arm in enumerate(arms):
        score = np.array([metrics["arms"][arm][name] for name in groups])
        low, high = np.array([metrics["intervals"][arm][name] for name in groups]).T
        x = np.arange(len(groups)) + (place - (len(arms) - 1) / 2) * 0.72 / len(arms)
        error = [np.maximum(score - low, 0), np.maximum(high - score, 0)]
        size = 8 if arm == VISMEM else 6
        axes.errorbar(x, score, error, fmt="o", markersize=size, color=colours[arm], elinewidth=1.6, label=label(arm))
    axes.set_xticks(range(len(groups)), [_with_count(metrics, name) for name in groups])
    axes.set_ylabel("score (%)")
    for edge in np.arange(len(groups) - 1) + 0.5:
        axes.axvline(edge, color="#E6E6E6", linewidth=1)
    axes.legend(frameon=False, ncols=len(arms), loc="lower center", bbox_to_anchor=(0.5, 1.0), handletextpad=0.3)
    return _png(figure)


def task_plot(metrics: Mapping[str, Any]) -> bytes:
    """Every task's score, from vanilla to VisMem; without a VisMem arm, vanilla alone."""
    tasks = metrics["tasks"]
    figure, axes = _figure(8.4, 0.9 + 0.32 * len(tasks))
    names = list(reversed(tasks))
    colours = arm_colours(list(metrics["arms"]))
    y = np.arange(len(names))
    ends = {
        arm: np.array([tasks[name]["arms"][arm] for name in names])
        for arm in (VANILLA, VISMEM)
        if arm in metrics["arms"]
    }
    if VISMEM in ends:
        axes.hlines(y, ends[VANILLA], ends[VISMEM], color="#C8C8C8", linewidth=3)
    for arm, scores in ends.items():
        axes.scatter(scores, y, s=52, color=colours[arm], label=label(arm), zorder=3)
    axes.set_yticks(y, [f"{name.replace('_', ' ')}  (n = {tasks[name]['n']})" for name in names])
    axes.set_xlim(-2, 102)
    axes.set_xlabel("score (%)")
    axes.grid(axis="x", color="#EEEEEE")
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), handletextpad=0.3)
    return _png(figure)


def invocation_plot(metrics: Mapping[str, Any], answers: Sequence[Prediction]) -> bytes:
    """VisMem's invocations an answer by task and kind, and where in the answer they stand (Figures 5 and 9)."""
    tasks = list(reversed([name for name in metrics["tasks"] if name in metrics["invocation"]["tasks"]]))
    figure = Figure(figsize=(8.4, 1.4 + 0.3 * max(len(tasks), 6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    height = 0.36
    for offset, kind in ((height / 2, MemoryKind.SHORT), (-height / 2, MemoryKind.LONG)):
        rates = [metrics["invocation"]["tasks"][task][kind.value]["per_answer"] for task in tasks]
        left.barh(np.arange(len(tasks)) + offset, rates, height, color=KIND_COLOURS[kind], label=kind.value)
    left.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    left.set_xlabel("invocations an answer")
    left.set_xlim(left=0)
    edges = np.linspace(0, 1, BINS + 1)
    width = 0.4 / BINS
    for offset, kind in ((-width / 2, MemoryKind.SHORT), (width / 2, MemoryKind.LONG)):
        shares = position_counts(answers, kind) / max(len(answers), 1)
        right.bar((edges[:-1] + edges[1:]) / 2 + offset, shares, width, color=KIND_COLOURS[kind], label=kind.value)
    right.set_xlim(0, 1)
    right.set_xlabel("relative position in the answer")
    right.set_ylabel("invocations an answer")
    for axes in (left, right):
        _clean(axes)
    right.legend(frameon=False, title="memory", loc="upper right")
    return _png(figure)


def gain_plot(arms: Mapping[str, Any]) -> bytes:
    """Every arm's gain over vanilla in a study, with the pooled 95 % interval; the small dots are single seeds.

    `arms` as `study_figures.summarise_arms` gives them.
    """
    names = [arm for arm in list(arms)[::-1] if arm != VANILLA]
    figure, axes = _figure(7.2, 0.8 + 0.26 * len(names))
    for y, arm in enumerate(names):
        colour = BLUE if arm == VISMEM else GREY
        gain, by_seed = arms[arm]["gain"], arms[arm]["gain_by_seed"].values()
        axes.hlines(y, *gain["ci95"], color=colour, linewidth=2)
        axes.scatter([seed["delta"] for seed in by_seed], [y] * len(by_seed), s=10, color="#000000", zorder=4)
        axes.scatter(gain["delta"], y, s=52, color=colour, zorder=3)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_yticks(range(len(names)), [label(arm) for arm in names])
    axes.set_xlabel("points over vanilla")
    axes.grid(axis="x", color="#EEEEEE")
    return _png(figure)


def position_counts(answers: Sequence[Prediction], kind: MemoryKind) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """(BINS,) number of invocations of one kind in each tenth of the answer; position 1.0 falls in the last."""
    places = [e.relative_position for answer in answers for e in answer.invocations if e.kind == kind.value]
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] = np.histogram(places, BINS, (0, 1))[0].astype(np.int64)
    return counts


def write_plots(
    metrics: Mapping[str, Any], predictions: Mapping[str, Sequence[Prediction]], folder: Path
) -> dict[str, bytes]:
    """Write `scores`, `tasks` and (with VisMem) `invocation` as PNG, and the CSV tables; return the PNGs by name."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {"scores": score_plot(metrics), "tasks": task_plot(metrics)}
    answers = predictions.get(VISMEM, ())
    if answers:
        images["invocation"] = invocation_plot(metrics, answers)
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image)
    scores = [
        (name, arm, metrics["arms"][arm][name], *metrics["intervals"][arm][name])
        for name in _groups(metrics)
        for arm in metrics["arms"]
    ]
    _write_csv(folder / "scores.csv", ("capability", "arm", "score", "low", "high"), scores)
    positions = [
        (kind.value, (place + 0.5) / BINS, int(count))
        for kind in MemoryKind
        for place, count in enumerate(position_counts(answers, kind))
    ]
    _write_csv(folder / "invocation_position.csv", ("kind", "relative_position", "invocations"), positions)
    return images


def _groups(metrics: Mapping[str, Any]) -> list[str]:
    """Overall, then the capabilities that have items."""
    return [OVERALL, *(name for name in CAPABILITIES if name in metrics["counts"])]


def _with_count(metrics: Mapping[str, Any], name: str) -> str:
    return f"{name}\nn = {metrics['counts'].get(name, metrics['n'])}"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _clean(axes)
    axes.grid(axis="y", color="#EEEEEE")
    return figure, axes


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
    return file.getvalue()


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
