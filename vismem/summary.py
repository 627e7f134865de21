"""What a run came to, for the terminal: scores, the gate's verdict, one served answer, and where the reports are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vismem.config import Config
from vismem.files import read_json
from vismem.records import Metrics, Release, Verdict

REPORTS = {
    "the data": "validate/report.html",
    "the scores": "evaluate/report.html",
    "the model card": "export/README.md",
}


def print_summary(
    config: Config, artifacts: Path, here: Path, profile: str | None, console: Console | None = None
) -> None:
    """Print the last run's result from its artifacts. UserError where a step's output is missing.

    `artifacts` is shown as given and meant from `here`, which may not be the working folder of a profile's run.
    """
    from vismem.evaluation.summary import headline, score_table

    console, folder = console or make_console(), here / artifacts
    metrics = Metrics.read(folder / "evaluate")
    release, verdict = Release.read(folder / "promote"), Verdict.read(folder / "promote")
    smoke = read_json(folder / "deploy" / "smoke.json", "run `vismem deploy` again")
    console.print("", score_table(metrics), headline(metrics), "", sep="\n")
    console.print(*verdict_lines(verdict, release), "", *example_lines(smoke), "", sep="\n")
    for what, name in REPORTS.items():
        if (folder / name).is_file():
            console.print(f"{what + ':':<16}{escape(str(artifacts / name))}", soft_wrap=True)
    ui = f"vismem ui --profile {profile}" if profile else "make ui"
    console.print(f"{'the registry:':<16}{config.registry.model_name} in MLflow; `{ui}` opens it")


def verdict_lines(verdict: Verdict, release: Release) -> list[str]:
    """The gate's verdict: one line of outcome, then one per rule with its reason. Rich markup."""
    name = f"{release.name} version {release.version}"
    passed = f"[bold green]RELEASED[/]: the gate passed {name}; it is the champion"
    refused = f"[bold red]NOT RELEASED[/]: the gate refused {name}"
    marks = {True: "[green]✓[/]", False: "[red]✗[/]"}
    return [
        passed if release.promoted else refused,
        *(f"  {marks[rule.passed]} {escape(rule.reason)}" for rule in verdict.rules),
    ]


def example_lines(smoke: Mapping[str, Any]) -> list[str]:
    """One answer as it came over gRPC, its memory invocations marked. Rich markup."""
    under = "" if smoke["promoted"] else ", for trying out: it is not released"
    return [
        f"An answer of the served model [bold]{escape(smoke['model'])}[/] (version {smoke['version']}{under}):",
        f"  question   {escape(smoke['question'])}",
        f"  answer     {escape(smoke['answer_marked'])}",
        f"  reference  {escape(smoke['reference'])}",
    ]


def print_models(rows: Sequence[Mapping[str, str]], name: str, store: str, console: Console | None = None) -> None:
    """The registered versions as a table, newest first."""
    console = console or make_console()
    if not rows:
        console.print(f"no version of '{name}' in {store} yet: run `vismem register`")
        return
    columns = [column.replace("_", " ") for column in rows[0]]
    table = Table(*columns, title=f"{name} in {store}", title_justify="left")
    for row in rows:
        table.add_row(*(escape(value) for value in row.values()))
    console.print(table)


def make_console() -> Console:
    """A console on stdout; where that is no terminal, wide enough that lines are not cut."""
    return Console(highlight=False, width=None if Console().is_terminal else 160)
