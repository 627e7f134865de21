"""What an evaluation says, in one sentence and in one terminal table."""

from typing import Any

from rich.table import Table

from vismem.records import OVERALL, VANILLA, VISMEM, Difference, Metrics, p_value

COLOURS = {"better": "green", "worse": "red", "not shown": "default"}


def headline(metrics: Metrics) -> str:
    """The result in words that claim no more than the interval and the test do."""
    before = metrics.arms[VANILLA][OVERALL]
    if VISMEM not in metrics.arms:
        return f"Vanilla answers {before:.1f} % of {metrics.n} questions correctly."
    gain, after = metrics.gain[OVERALL], metrics.arms[VISMEM][OVERALL]
    result = f"VisMem is {gain.outcome} on these questions"
    if gain.outcome == "not shown":
        result = "No difference can be shown"
    scores = f"{after:.1f} % of {metrics.n} test questions correctly, vanilla {before:.1f} %"
    return f"{result}. VisMem answers {scores}: {change(gain)}."


def headline_figures(metrics: Metrics) -> dict[str, Any]:
    """The few figures that fit one line of `dvc metrics show`: each arm's overall score, and the gain over vanilla."""
    figures: dict[str, Any] = {name: arm[OVERALL] for name, arm in metrics.arms.items()}
    if VISMEM in metrics.arms:
        gain = metrics.gain[OVERALL]
        figures["gain"] = {"points": gain.delta, "low": gain.ci95[0], "high": gain.ci95[1]}
    return figures


def change(difference: Difference) -> str:
    """A paired difference, as `+5.3 points (95 % interval +2.1 to +8.4, p = 0.012)`."""
    low, high = difference.ci95
    return f"{difference.delta:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, {p_value(difference.p)})"


def score_table(metrics: Metrics) -> Table:
    """Vanilla against VisMem by capability, in percent with 95 % intervals: what `make demo` prints.

    KeyError where `metrics` has no VisMem arm.
    """
    table = Table(title=f"Scores on {metrics.n} test questions (%, with 95 % intervals)", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("n", "vanilla", "VisMem", "gain (points)", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in (*metrics.counts, OVERALL):
        gain, (low, high) = metrics.gain[name], metrics.gain[name].ci95
        cells = [name, str(metrics.counts.get(name, metrics.n))]
        for arm in (VANILLA, VISMEM):
            least, most = metrics.intervals[arm][name]
            cells.append(f"{metrics.arms[arm][name]:.1f}\n[dim]{least:.1f}-{most:.1f}[/]")
        cells.append(f"[{COLOURS[gain.outcome]}]{gain.delta:+.1f}[/]\n[dim]{low:+.1f} to {high:+.1f}[/]")
        cells.append(p_value(gain.judged_p).removeprefix("p ").removeprefix("= "))
        if name == OVERALL:
            table.add_section()
        table.add_row(*cells, style="bold" if name == OVERALL else None)
    seconds = [f"{metrics.arms[arm]['seconds_per_sample']:.4f}" for arm in (VANILLA, VISMEM)]
    overhead = [f"{metrics.overhead[VISMEM]:+.0%}"] if VISMEM in metrics.overhead else []
    table.add_row("seconds per sample", "", *seconds, *overhead)
    return table
