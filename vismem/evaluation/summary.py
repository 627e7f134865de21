"""What an evaluation says, in one sentence and in one terminal table."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from vismem.evaluation.arms import VANILLA, VISMEM
from vismem.evaluation.metrics import CAPABILITIES, OVERALL

SIGNIFICANT = 0.05


def headline(metrics: Mapping[str, Any]) -> str:
    """The result in words that claim no more than the interval and the test do."""
    if VISMEM not in metrics["arms"]:
        return f"Vanilla answers {metrics['arms'][VANILLA][OVERALL]:.1f} % of {metrics['n']} questions correctly."
    gain = metrics["gain"][OVERALL]
    before, after = metrics["arms"][VANILLA][OVERALL], metrics["arms"][VISMEM][OVERALL]
    figures = (
        f"VisMem answers {after:.1f} % of {metrics['n']} test questions correctly, vanilla {before:.1f} %: "
        f"{change(gain)}."
    )
    low, high = gain["ci95"]
    if gain["p"] >= SIGNIFICANT or low <= 0 <= high:
        return f"No difference can be shown. {figures}"
    return f"VisMem {'is better' if gain['delta'] > 0 else 'is worse'} on these questions. {figures}"


def headline_figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The few figures that fit one line of `dvc metrics show`: each arm's overall score, and the gain over vanilla."""
    figures: dict[str, Any] = {name: arm[OVERALL] for name, arm in metrics["arms"].items()}
    if VISMEM in metrics["arms"]:
        gain = metrics["gain"][OVERALL]
        figures["gain"] = {"points": gain["delta"], "low": gain["ci95"][0], "high": gain["ci95"][1]}
    return figures


def change(difference: Mapping[str, Any]) -> str:
    """A paired difference, as `+5.3 points (95 % interval +2.1 to +8.4, p = 0.012)`."""
    low, high = difference["ci95"]
    return f"{difference['delta']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, {p_value(difference['p'])})"


def p_value(p: float) -> str:
    """A p-value as people write it; never 0."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def score_table(metrics: Mapping[str, Any]) -> Table:
    """Vanilla against VisMem by capability, in percent with 95 % intervals: what `make demo` prints.

    KeyError where `metrics` has no VisMem arm.
    """
    table = Table(title=f"Scores on {metrics['n']} test questions (%, with 95 % intervals)", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("n", "vanilla", "VisMem", "gain (points)", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in (*(name for name in CAPABILITIES if name in metrics["counts"]), OVERALL):
        gain = metrics["gain"][name]
        low, high = gain["ci95"]
        style = "bold" if name == OVERALL else None
        shown = gain["p"] < SIGNIFICANT and not low <= 0 <= high
        colour = ("green" if gain["delta"] > 0 else "red") if shown else "default"
        if name == OVERALL:
            table.add_section()
        table.add_row(
            name,
            str(metrics["counts"].get(name, metrics["n"])),
            _with_interval(metrics, VANILLA, name),
            _with_interval(metrics, VISMEM, name),
            f"[{colour}]{gain['delta']:+.1f}[/]\n[dim]{low:+.1f} to {high:+.1f}[/]",
            p_value(gain["p"]).removeprefix("p ").removeprefix("= "),
            style=style,
        )
    seconds = [metrics["arms"][arm]["seconds_per_sample"] for arm in (VANILLA, VISMEM)]
    overhead = metrics["overhead"].get(VISMEM)
    table.add_row(
        "seconds a sample",
        "",
        *(f"{value:.4f}" for value in seconds),
        "" if overhead is None else f"{overhead:+.0%}",
        "",
    )
    return table


def _with_interval(metrics: Mapping[str, Any], arm: str, name: str) -> str:
    low, high = metrics["intervals"][arm][name]
    return f"{metrics['arms'][arm][name]:.1f}\n[dim]{low:.1f}-{high:.1f}[/]"
