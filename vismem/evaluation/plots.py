"""The charts of an evaluation (paper Figures 5 and 9), and the small tables behind them.

A chart is a few panels, small enough for a phone. The report shows each as SVG in the page's own colours; for
`dvc plots`, MLflow and the model card the panels of a chart are one PNG.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from vismem.evaluation.arms import label
from vismem.evaluation.metrics import invocation_places
from vismem.evaluation.predictions import Prediction
from vismem.models.kinds import MemoryKind
from vismem.records import OVERALL, VANILLA, VISMEM, MemoryUse, Metrics

# Okabe and Ito's colours: they stay apart for colour-blind readers. Vanilla is also a ring, for readers without colour.
BLUE, ORANGE, GREY, RULE = "#0072B2", "#D55E00", "#7F7F7F", "#E3E7EC"
INK, PAPER, BAND = "#1C2430", "#FFFFFF", "#C8C8C8"
KIND_COLOURS = {MemoryKind.SHORT: BLUE, MemoryKind.LONG: ORANGE}
KIND_COLUMNS = {f"invocations_{kind.value}": f"{kind.value}-term" for kind in KIND_COLOURS}  # of stage2.csv
# In a page a colour is a variable of its style sheet, so that a chart follows the page into the dark.
VARIABLES = {BLUE: "blue", ORANGE: "orange", GREY: "grey", RULE: "line", INK: "ink", PAPER: "paper", BAND: "band"}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "text.parse_math": False,  # a task may have any name
    **{"legend.frameon": False, "legend.handlelength": 1, "legend.handletextpad": 0.5, "legend.columnspacing": 1.2},
    "svg.fonttype": "none",
    "svg.hashsalt": "vismem",  # the same bytes for the same chart
}
BINS = 10  # of the relative position
MIDDLES = (np.arange(BINS) + 0.5) / BINS
LONGEST_NAME = 24  # letters of a task, left of its row
WIDTH = 3.5  # inches of a panel: 336 pixels, a phone's


@dataclass(frozen=True)
class Panel:
    """One small chart: its title and what it shows in words, its height in inches, and the function that draws it."""

    title: str
    words: str
    height: float
    draw: Callable[[Axes], None]


def score_panels(metrics: Metrics) -> list[Panel]:
    """Scores with 95 % intervals: a panel overall and for each capability, a row per arm; dashed, vanilla's score."""
    arms = list(metrics.arms)
    ends = [end for groups in metrics.intervals.values() for interval in groups.values() for end in interval]

    def draw(axes: Axes, group: str) -> None:
        axes.axvline(metrics.arms[VANILLA][group], color=GREY, linewidth=1, linestyle="--")
        for y, arm in enumerate(arms):
            draw_dot(axes, metrics.arms[arm][group], y, arm, metrics.intervals[arm][group])
        name_rows(axes, [label(arm) for arm in arms])
        axes.set_xlim(min(ends) - 3, max(ends) + 3)
        axes.set_xlabel("score (%)")

    panels = []
    for group in (OVERALL, *metrics.counts):
        words = ", ".join(f"{label(arm)} {metrics.arms[arm][group]:.1f} %" for arm in arms)
        title = f"{group} (n = {metrics.counts.get(group, metrics.n)})"
        panels.append(Panel(title, f"Score, {group}: {words}", _height(len(arms)), partial(draw, group=group)))
    return panels


def task_panels(metrics: Metrics) -> list[Panel]:
    """Every task's score, from vanilla to VisMem, a panel for each capability; without a VisMem arm, vanilla alone."""

    def draw(axes: Axes, names: Sequence[str]) -> None:
        for y, name in enumerate(names):
            scores = metrics.tasks[name].arms
            if VISMEM in scores:
                axes.hlines(y, scores[VANILLA], scores[VISMEM], color=BAND, linewidth=3)
            for arm in (VANILLA, VISMEM):
                if arm in scores:
                    draw_dot(axes, scores[arm], y, arm, name="" if y else label(arm))
        name_rows(axes, [f"{_short(name)} ({metrics.tasks[name].n})" for name in names])
        axes.set_xlim(-3, 103)
        axes.set_xlabel("score (%)")

    panels = []
    for capability in metrics.counts:
        names = [name for name, task in metrics.tasks.items() if task.capability == capability]
        words = f"Score of vanilla and VisMem in the {len(names)} tasks of {capability}; the table has the figures"
        panels.append(Panel(capability, words, _height(len(names)), partial(draw, names=names)))
    return panels


def invocation_panels(tasks: Mapping[str, MemoryUse], answers: Sequence[Prediction]) -> list[Panel]:
    """VisMem's invocations per answer by task and kind, and where in the answer they stand (Figures 5 and 9)."""
    sides = {MemoryKind.SHORT: -0.5, MemoryKind.LONG: 0.5}

    def by_task(axes: Axes) -> None:
        for kind, side in sides.items():
            rates = [getattr(use, kind.value).per_answer for use in tasks.values()]
            places = np.arange(len(tasks)) + side * 0.36
            axes.barh(places, rates, 0.36, color=KIND_COLOURS[kind], label=f"{kind.value}-term")
        name_rows(axes, [_short(task) for task in tasks])
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
    """The charts by name: `scores`, `tasks`, with VisMem `invocation`, and `training` where there are curves."""
    charts = {"scores": score_panels(metrics), "tasks": task_panels(metrics)}
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


def draw_dot(axes: Axes, x: float, y: int, arm: str, interval: Sequence[float] = (), name: str = "") -> None:
    """An arm's figure in row `y`: VisMem's blue, vanilla's a ring, any other's grey; `interval` is (low, high)."""
    colour = BLUE if arm == VISMEM else GREY
    if interval:
        axes.hlines(y, *interval, color=colour, linewidth=2)
    inside = PAPER if arm == VANILLA else colour
    axes.scatter(x, y, s=44, facecolors=inside, edgecolors=colour, linewidths=1.8, zorder=3, label=name or None)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a chart, the first on top."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=RULE)


def to_svg(panel: Panel) -> Markup:
    """A panel as an SVG element whose colours are variables of the page; the same text for the same panel."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, panel.height), layout="constrained")
        axes = figure.subplots()
        panel.draw(axes)
        axes.set_title(panel.title)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)  # nothing refers to them, and several charts share the page
    for colour, variable in VARIABLES.items():
        text = text.replace(colour.lower(), f"var(--{variable})")
    return Markup(text)


def to_sheet(panels: Sequence[Panel]) -> bytes:
    """The panels below each other as PNG."""
    with mpl.rc_context(STYLE):
        size = (1.25 * WIDTH, sum(panel.height for panel in panels))
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.07))
        rows = figure.subplots(len(panels), 1, height_ratios=[panel.height for panel in panels], squeeze=False)[:, 0]
        for axes, panel in zip(rows, panels, strict=True):
            panel.draw(axes)
            axes.set_title(panel.title)
            if axes.get_legend_handles_labels()[1]:  # beside the title
                axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        return to_png(figure)


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
    return file.getvalue()


def _short(task: str) -> str:
    """A task's name, cut where it would leave no room for the chart."""
    name = task.replace("_", " ")
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _height(rows: int) -> float:
    return 0.75 + 0.27 * max(rows, 1)
