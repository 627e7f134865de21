"""How charts are drawn: panels, each as SVG in a page's own colours, whose points say what they are, or all as PNG."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from vismem.records import VANILLA, VISMEM

# Okabe and Ito's colours: they stay apart for colour-blind readers. Vanilla is also a ring, for readers without colour.
BLUE, ORANGE, GREY, RULE = "#0072B2", "#D55E00", "#7F7F7F", "#E3E7EC"
INK, PAPER, BAND = "#1C2430", "#FFFFFF", "#C8C8C8"
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
WIDTH = 3.5  # inches of a panel: 336 pixels, a phone's
_TIP = "tip:"  # begins the id of what says something to those who point at it


@dataclass(frozen=True)
class Panel:
    """One small chart: its title and what it shows in words, its height in inches, and the function that draws it."""

    title: str
    words: str
    height: float
    draw: Callable[[Axes], None]


def draw_dot(
    axes: Axes, x: float, y: float, arm: str, interval: Sequence[float] = (), name: str = "", words: str = ""
) -> None:
    """An arm's figure in row `y`: VisMem's blue, vanilla's a ring, any other's grey; `interval` is (low, high).

    `name` is for the legend; the page shows `words` to those who point at it.
    """
    colour = BLUE if arm == VISMEM else GREY
    if interval:
        axes.hlines(y, *interval, color=colour, linewidth=2)
    inside = PAPER if arm == VANILLA else colour
    dot = axes.scatter(x, y, s=44, facecolors=inside, edgecolors=colour, linewidths=1.8, zorder=3, label=name or None)
    say(dot, words)


def say(artist: Artist, words: str) -> None:
    """The page shows `words` to those who point at the artist."""
    artist.set_gid(f"{_TIP}{words}" if words else None)


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
    text = re.sub(rf" id=([\"']){_TIP}", r" data-tip=\1", text)
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
