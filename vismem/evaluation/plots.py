"""The charts of an evaluation (paper Figures 5, 6 and 9), and the small tables behind them.

A chart is a few panels, small enough for a phone. The report shows each as SVG in the page's own colours; for
`dvc plots`, MLflow and the model card the panels of a chart are one PNG.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

from vismem.evaluation.arms import label
from vismem.evaluation.metrics import invocation_places
from vismem.evaluation.panels import BAND, BLUE, GREY, ORANGE, Panel, draw_dot, name_rows, say, to_sheet
from vismem.evaluation.predictions import Prediction
from vismem.models.kinds import MemoryKind
from vismem.pages import storable
from vismem.records import OVERALL, VANILLA, VISMEM, Interval, MemoryUse, Metrics

KIND_COLOURS = {MemoryKind.SHORT: BLUE, MemoryKind.LONG: ORANGE}
KIND_COLUMNS = {f"invocations_{kind.value}": f"{kind.value}-term" for kind in KIND_COLOURS}  # of stage2.csv
BINS = 10  # of the relative position
MIDDLES = (np.arange(BINS) + 0.5) / BINS
WIDEST_NAME = 125  # points of a task's name, left of its row: half of a panel
_FONT = FontProperties(size=9)


def score_panels(metrics: Metrics) -> list[Panel]:
    """Scores with 95 % intervals: a panel overall and for each capability, a row per arm; dashed, vanilla's score."""
    return [
        interval_panel(
            f"{group} (n = {metrics.counts.get(group, metrics.n)})",
            {arm: (scores[group], metrics.intervals[arm][group]) for arm, scores in metrics.arms.items()},
            VANILLA,
            [end for groups in metrics.intervals.values() for interval in groups.values() for end in interval],
        )
        for group in (OVERALL, *metrics.counts)
    ]


def interval_panel(
    title: str, scores: Mapping[str, tuple[float, Interval]], reference: str, ends: Sequence[float]
) -> Panel:
    """Each arm's score in percent with its interval, a row per arm; dashed, that of `reference`.

    `ends`: of the intervals of all panels that stand beside each other, which have one scale.
    """

    def draw(axes: Axes) -> None:
        axes.axvline(scores[reference][0], color=GREY, linewidth=1, linestyle="--")
        for y, (arm, (score, interval)) in enumerate(scores.items()):
            draw_dot(axes, score, y, arm, interval, words=in_words(arm, score, interval))
        name_rows(axes, [short_name(label(arm)) for arm in scores])
        axes.set_xlim(min(ends) - 3, max(ends) + 3)
        axes.set_xlabel("score (%)")

    words = ", ".join(f"{label(arm)} {score:.1f} %" for arm, (score, _) in scores.items())
    return Panel(title, f"Score, {title}: {words}", _height(len(scores)), draw)


def task_panels(metrics: Metrics) -> list[Panel]:
    """Every task's score, from vanilla to VisMem, a panel for each capability; without a VisMem arm, vanilla alone."""

    def draw(axes: Axes, names: Sequence[str]) -> None:
        for y, name in enumerate(names):
            scores = metrics.tasks[name].arms
            if VISMEM in scores:
                axes.hlines(y, scores[VANILLA], scores[VISMEM], color=BAND, linewidth=3)
            for arm in (VANILLA, VISMEM):
                if arm in scores:
                    words = f"{label(arm)}, {name}: {scores[arm]:.1f} %"
                    draw_dot(axes, scores[arm], y, arm, name="" if y else label(arm), words=words)
        name_rows(axes, [f"{short_name(name)} ({metrics.tasks[name].n})" for name in names])
        axes.set_xlim(-3, 103)
        axes.set_xlabel("score (%)")

    panels = []
    for capability in metrics.counts:
        names = [name for name, task in metrics.tasks.items() if task.capability == capability]
        words = f"Score of vanilla and VisMem in the {len(names)} tasks of {capability}; the table has the figures"
        panels.append(Panel(capability, words, _height(len(names)), partial(draw, names=names)))
    return panels


def time_panel(metrics: Metrics) -> Panel | None:
    """Every arm's score against the time of its answers (Figure 6); None where no time was measured."""
    times = {arm: 1000 * figures["seconds_per_sample"] for arm, figures in metrics.arms.items()}
    times = {arm: time for arm, time in times.items() if time > 0}
    if not times:
        return None
    words = {
        arm: f"{in_words(arm, metrics.arms[arm][OVERALL], metrics.intervals[arm][OVERALL])}, {time:.1f} ms"
        for arm, time in times.items()
    }

    def draw(axes: Axes) -> None:
        for arm, time in sorted(times.items(), key=lambda item: item[0] in (VANILLA, VISMEM)):  # these on top
            (low, high), colour = metrics.intervals[arm][OVERALL], BLUE if arm == VISMEM else GREY
            axes.vlines(time, low, high, color=colour, linewidth=1, alpha=0.5)
            draw_dot(axes, time, metrics.arms[arm][OVERALL], arm, words=words[arm])
            if arm in (VANILLA, VISMEM):
                # above the dot also where that is the interval's end
                place: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
                axes.annotate(label(arm), (time, high), color=colour, **place)
        axes.grid()
        axes.margins(0.15)
        axes.set_xlabel("time per question (ms)")
        axes.set_ylabel("score (%)")

    return Panel("overall", f"Score against time: {'; '.join(words.values())}", 2.8, draw)


def in_words(arm: str, score: float, interval: Interval) -> str:
    """A score with its interval."""
    return f"{label(arm)}: {score:.1f} % ({interval[0]:.1f} to {interval[1]:.1f})"


def invocation_panels(tasks: Mapping[str, MemoryUse], answers: Sequence[Prediction]) -> list[Panel]:
    """VisMem's invocations per answer by task and kind, and where in the answer they stand (Figures 5 and 9)."""
    sides = {MemoryKind.SHORT: -0.5, MemoryKind.LONG: 0.5}

    def by_task(axes: Axes) -> None:
        for kind, side in sides.items():
            rates = [getattr(use, kind.value).per_answer for use in tasks.values()]
            places = np.arange(len(tasks)) + side * 0.36
            bars = axes.barh(places, rates, 0.36, color=KIND_COLOURS[kind], label=f"{kind.value}-term")
            for bar, task, rate in zip(bars, tasks, rates, strict=True):
                say(bar, f"{task}, {kind.value}-term: {rate:.2f} per answer")
        name_rows(axes, [short_name(task) for task in tasks])
        axes.set_xlim(left=0)
        axes.set_xlabel("invocations per answer")

    def by_place(axes: Axes) -> None:
        for kind, side in sides.items():
            shares = position_counts(answers, kind) / max(len(answers), 1)
            axes.bar(MIDDLES + side * 0.4 / BINS, shares, 0.4 / BINS, color=KIND_COLOURS[kind])
        axes.grid(axis="y")
        axes.set_xlim(0, 1)
        axes.set_xlabel("place in the answer (0 its start, 1 its end)")
        axes.set_ylabel("invocations per answer")

    return [
        Panel("by task", "VisMem's memory invocations by task and kind", _height(len(tasks)), by_task),
        Panel("by place", "VisMem's memory invocations by their place in the answer", 2.4, by_place),
    ]


def training_panels(curves: Mapping[str, pd.DataFrame]) -> list[Panel]:
    """How training went: the loss of the warm start, each GRPO stage's reward and KL, stage II's use of memory.

    `curves`: by name, the tables that the training steps write; what is missing, empty or zero throughout is left out.
    """
    stages = (
        ("warm_start", "warm start", "loss"),
        ("stage1", "stage I", "reward"),
        ("stage1", "stage I", "kl"),
        ("stage2", "stage II", "reward"),
        ("stage2", "stage II", "kl"),
    )
    words = {"loss": "loss", "reward": "reward", "kl": "KL to the reference policy"}
    panels = [
        _curve(f"{stage}: {words[column]}", curves[name], {column: BLUE})
        for name, stage, column in stages
        if name in curves and column in curves[name] and curves[name][column].any()
    ]
    if "stage2" in curves and len(curves["stage2"]):
        columns = dict(zip(KIND_COLUMNS, KIND_COLOURS.values(), strict=True))
        panels.append(_curve("stage II: memories per answer", curves["stage2"], columns))
    return panels


def read_curves(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of the training steps that led to a model, by name, from its folder."""
    return {file.stem: pd.read_csv(file) for file in sorted(folder.glob("*.csv"))}


def _curve(title: str, table: pd.DataFrame, columns: Mapping[str, str]) -> Panel:
    """Columns over the step: every value, faint, and the mean of a fifteenth of the steps around it."""

    def draw(axes: Axes) -> None:
        window = max(len(table) // 15, 1)
        for column, colour in columns.items():
            axes.plot(table["step"], table[column], color=colour, linewidth=0.8, alpha=0.35)
            mean = table[column].rolling(2 * window + 1, center=True, min_periods=1).mean()
            axes.plot(table["step"], mean, color=colour, linewidth=1.8, label=KIND_COLUMNS.get(column))
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
        axes.set_xlabel("step")

    return Panel(title, f"{title}, over {len(table)} steps", 2.0, draw)


def position_counts(answers: Sequence[Prediction], kind: MemoryKind) -> npt.NDArray[np.int64]:
    """(BINS,) number of invocations of one kind in each tenth of the answer; position 1.0 falls in the last."""
    return np.histogram(invocation_places(answers, kind), BINS, (0, 1))[0]


def evaluation_charts(
    metrics: Metrics, predictions: Mapping[str, Sequence[Prediction]], curves: Mapping[str, pd.DataFrame]
) -> dict[str, list[Panel]]:
    """The charts by name: `scores`, `tasks`; where they are known `time`, VisMem's `invocation` and `training`."""
    charts = {"scores": score_panels(metrics), "tasks": task_panels(metrics)}
    if time := time_panel(metrics):
        charts["time"] = [time]
    if metrics.invocation is not None:
        used = metrics.invocation.tasks
        charts["invocation"] = invocation_panels({task: used[task] for task in metrics.tasks}, predictions[VISMEM])
    if panels := training_panels(curves):
        charts["training"] = panels
    return charts


def write_plots(
    charts: Mapping[str, Sequence[Panel]],
    metrics: Metrics,
    predictions: Mapping[str, Sequence[Prediction]],
    folder: Path,
) -> None:
    """Write each chart as PNG, and the scores and the places of the invocations as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, panels in charts.items():
        (folder / f"{name}.png").write_bytes(to_sheet(panels))
    scores = [
        (name, arm, metrics.arms[arm][name], *metrics.intervals[arm][name])
        for name in (OVERALL, *metrics.counts)
        for arm in metrics.arms
    ]
    columns = ["capability", "arm", "score", "low", "high"]
    pd.DataFrame(scores, columns=columns).to_csv(folder / "scores.csv", index=False)
    answers = predictions.get(VISMEM, ())
    positions = pd.concat(
        pd.DataFrame({"kind": kind, "relative_position": MIDDLES, "invocations": position_counts(answers, kind)})
        for kind in MemoryKind
    )
    positions.to_csv(folder / "invocation_position.csv", index=False)


def short_name(task: str) -> str:
    """A task's name, cut where it would leave no room for the chart."""
    name = storable(task).replace("_", " ")[:60]
    while text_to_path.get_text_width_height_descent(name, _FONT, False)[0] > WIDEST_NAME:
        name = f"{name[:-2]}…"
    return name


def _height(rows: int) -> float:
    return 0.75 + 0.27 * max(rows, 1)
