"""The plots of an evaluation as PNG bytes, and the small tables behind them for `dvc plots` (paper Figures 5 and 9)."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vismem.evaluation.arms import label
from vismem.evaluation.metrics import invocation_places
from vismem.evaluation.predictions import Prediction
from vismem.models.kinds import MemoryKind
from vismem.records import OVERALL, VANILLA, VISMEM, MemoryUse, Metrics

# Okabe and Ito's colours: they stay apart for colour-blind readers. Vanilla is also a ring, for readers without colour.
BLUE, ORANGE, GREY, RULE = "#0072B2", "#D55E00", "#7F7F7F", "#E3E7EC"
KIND_COLOURS = {MemoryKind.SHORT: BLUE, MemoryKind.LONG: ORANGE}
BINS = 10  # of the relative position
MIDDLES = (np.arange(BINS) + 0.5) / BINS
WIDTH = 9.6  # inches: at the page's width, letters are as large as its text


def score_plot(metrics: Metrics) -> bytes:
    """Scores with 95 % intervals: one row per arm, a panel overall and for each capability; dashed, vanilla's score."""
    arms, groups = list(metrics.arms), [OVERALL, *metrics.counts]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.27 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, groups, strict=True):
        axes.axvline(metrics.arms[VANILLA][name], color=GREY, linewidth=1, linestyle="--")
        for y, arm in enumerate(arms):
            draw_dot(axes, metrics.arms[arm][name], y, arm, metrics.intervals[arm][name])
        axes.set_title(f"{name}\nn = {metrics.counts.get(name, metrics.n)}", fontsize="medium")
        name_rows(axes, [label(arm) for arm in arms])
    figure.supxlabel("score (%)", fontsize="medium")
    return to_png(figure)


def task_plot(metrics: Metrics) -> bytes:
    """Every task's score, from vanilla to VisMem; without a VisMem arm, vanilla alone."""
    tasks = metrics.tasks
    figure = Figure(figsize=(WIDTH, 1.0 + 0.29 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    for y, task in enumerate(tasks.values()):
        if VISMEM in task.arms:
            axes.hlines(y, task.arms[VANILLA], task.arms[VISMEM], color="#C8C8C8", linewidth=3)
        for arm in (VANILLA, VISMEM):
            if arm in task.arms:
                draw_dot(axes, task.arms[arm], y, arm, name="" if y else label(arm))
    name_rows(axes, [f"{name.replace('_', ' ')}  (n = {task.n})" for name, task in tasks.items()])
    axes.set_xlim(-2, 102)
    axes.set_xlabel("score (%)")
    figure.legend(frameon=False, ncols=2, loc="outside upper center", handletextpad=0.3)
    return to_png(figure)


def invocation_plot(tasks: Mapping[str, MemoryUse], answers: Sequence[Prediction]) -> bytes:
    """VisMem's invocations per answer by task and kind, and where in the answer they stand (Figures 5 and 9)."""
    figure = Figure(figsize=(WIDTH, 1.4 + 0.29 * max(len(tasks), 6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    height, width = 0.36, 0.4 / BINS
    for side, kind in ((-0.5, MemoryKind.SHORT), (0.5, MemoryKind.LONG)):
        rates = [getattr(use, kind.value).per_answer for use in tasks.values()]
        left.barh(np.arange(len(tasks)) + side * height, rates, height, color=KIND_COLOURS[kind])
        shares = position_counts(answers, kind) / max(len(answers), 1)
        name = f"{kind.value}-term memory"
        right.bar(MIDDLES + side * width, shares, width, color=KIND_COLOURS[kind], label=name)
    name_rows(left, [task.replace("_", " ") for task in tasks])
    left.set_xlim(left=0)
    left.set_xlabel("invocations per answer")
    _clean(right)
    right.grid(axis="y", color=RULE)
    right.set_xlim(0, 1)
    right.set_xlabel("place in the answer (0 its start, 1 its end)")
    right.set_ylabel("invocations per answer")
    figure.legend(frameon=False, ncols=2, loc="outside upper center")
    return to_png(figure)


def position_counts(answers: Sequence[Prediction], kind: MemoryKind) -> npt.NDArray[np.int64]:
    """(BINS,) number of invocations of one kind in each tenth of the answer; position 1.0 falls in the last."""
    return np.histogram(invocation_places(answers, kind), BINS, (0, 1))[0]


def write_plots(metrics: Metrics, predictions: Mapping[str, Sequence[Prediction]], folder: Path) -> dict[str, bytes]:
    """Write `scores`, `tasks` and (with VisMem) `invocation` as PNG, and the CSV tables; return the PNGs by name."""
    folder.mkdir(parents=True, exist_ok=True)
    answers = predictions.get(VISMEM, ())
    images = {"scores": score_plot(metrics), "tasks": task_plot(metrics)}
    if metrics.invocation is not None:
        used = metrics.invocation.tasks
        images["invocation"] = invocation_plot({task: used[task] for task in metrics.tasks}, answers)
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image)
    scores = [
        (name, arm, metrics.arms[arm][name], *metrics.intervals[arm][name])
        for name in (OVERALL, *metrics.counts)
        for arm in metrics.arms
    ]
    columns = ["capability", "arm", "score", "low", "high"]
    pd.DataFrame(scores, columns=columns).to_csv(folder / "scores.csv", index=False)
    positions = pd.concat(
        pd.DataFrame({"kind": kind, "relative_position": MIDDLES, "invocations": position_counts(answers, kind)})
        for kind in MemoryKind
    )
    positions.to_csv(folder / "invocation_position.csv", index=False)
    return images


def draw_dot(axes: Axes, x: float, y: int, arm: str, interval: Sequence[float] = (), name: str = "") -> None:
    """An arm's figure in row `y`: VisMem's blue, vanilla's a ring, any other's grey; `interval` is (low, high)."""
    colour = BLUE if arm == VISMEM else GREY
    if interval:
        axes.hlines(y, *interval, color=colour, linewidth=2)
    inside = "#FFFFFF" if arm == VANILLA else colour
    axes.scatter(x, y, s=44, facecolors=inside, edgecolors=colour, linewidths=1.8, zorder=3, label=name or None)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a chart, the first on top."""
    _clean(axes)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=RULE)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
    return file.getvalue()
