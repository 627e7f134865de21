"""What a run came to, for the terminal: scores, the gate's verdict, one served answer, and where the reports are."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vismem.config import Config
from vismem.errors import UserError
from vismem.files import read_json
from vismem.messages import Caller
from vismem.provenance import MANIFEST, sha256_file
from vismem.records import EXAMPLE, VISMEM, Metrics, Release, Verdict

REPORTS = {
    "the data": "validate/report.html",
    "the scores": "evaluate/report.html",
    "the model card": "export/README.md",
}


def print_summary(config: Config, artifacts: Path, caller: Caller, console: Console | None = None) -> None:
    """Print the last run's result from its artifacts, with paths as the caller sees them.

    UserError where nothing was run yet, or a step's output is missing.
    """
    from vismem.evaluation.summary import headline, score_table

    console = console or make_console()
    if not any((artifacts / record.STEP).is_dir() for record in (Metrics, Release)):
        raise UserError(f"no run yet, {artifacts / 'evaluate'} is not there: run `vismem repro`")
    metrics = Metrics.read(artifacts / "evaluate")
    release, verdict = Release.read(artifacts / "promote"), Verdict.read(artifacts / "promote")
    judged = _is_of(release, metrics, artifacts / "export")
    smoke = read_json(artifacts / "deploy" / "smoke.json", "run `vismem deploy` again")
    table = [score_table(metrics)] if VISMEM in metrics.arms else []
    console.print("", *table, headline(metrics), "", sep="\n")
    if judged:
        console.print(*verdict_lines(verdict, release), "", *example_lines(smoke), "", sep="\n")
    else:
        said = f"the last verdict, of {release.name} version {release.version}, is of an earlier run"
        console.print(f"[bold yellow]NOT JUDGED YET[/]: {said}; `vismem repro` goes on", "", sep="\n")
    for what, name in REPORTS.items():
        if (artifacts / name).is_file():
            console.print(f"{what + ':':<16}{escape(caller.path(artifacts / name))}", soft_wrap=True)
    ui = f"vismem ui --profile {caller.profile}" if caller.profile else "make ui"
    console.print(f"{'the registry:':<16}{config.registry.model_name} in MLflow; `{ui}` opens it")
    if judged and (images := sorted((artifacts / "deploy").glob(f"{EXAMPLE}-*"))):
        command = ask_command(caller, artifacts / "export", images, smoke["question"])
        console.print("", "Ask it yourself:", escape(command), sep="\n", soft_wrap=True)


def _is_of(release: Release, metrics: Metrics, bundle: Path) -> bool:
    """Whether the bundle that was judged is the one that is there, and of the model that was evaluated last."""
    if not (bundle / MANIFEST).is_file() or not release.manifest_sha256:
        return True  # nothing tells
    model = read_json(bundle / "lineage.json", "run `vismem export` again")["inputs_sha256"]["stage2"]
    return (release.manifest_sha256, metrics.stage2_sha256) == (sha256_file(bundle / MANIFEST), model)


def verdict_lines(verdict: Verdict, release: Release) -> list[str]:
    """The gate's verdict: one line of outcome, then one per rule with its reason. Rich markup."""
    name = f"{release.name} version {release.version}"
    passed = f"[bold green]RELEASED[/]: the gate passed {name}; it became the champion"
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


def ask_command(caller: Caller, model: Path, images: Sequence[Path], question: str) -> str:
    """The command that asks a model of this machine a question, as the caller can paste it into their shell."""
    named = [part for image in images for part in ("--image", caller.path(image))]
    return shlex.join([*caller.program(), "ask", "--model", caller.path(model), *named, question])


def print_models(rows: Sequence[Mapping[str, str]], name: str, store: str, console: Console | None = None) -> None:
    """The registered versions as a table, newest first."""
    if rows:
        print_table(rows, f"{name} in {store}", console)
    else:
        (console or make_console()).print(f"no version of '{name}' in {store} yet: run `vismem register`")


def print_table(rows: Sequence[Mapping[str, str]], title: str, console: Console | None = None) -> None:
    """Rows of the same columns as a table."""
    columns = [column.replace("_", " ") for column in rows[0]]
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(escape(value) for value in row.values()))
    (console or make_console()).print(table)


def make_console() -> Console:
    """A console on stdout; where that is no terminal, wide enough that lines are not cut."""
    return Console(highlight=False, width=None if Console().is_terminal else 160)
