"""The run's summary as Markdown, from its journal: what every task made, or why it failed."""

from collections.abc import Sequence

from vismem.orchestration import journal as notes
from vismem.orchestration.journal import Entry
from vismem.orchestration.results import write_page
from vismem.steps import STEPS

GOOD = "SUCCEEDED"
SILENT = "No task left a reason: the one that failed never began its work (killed, no image, no node)"
KILLED = "it ended without a word: killed from outside (out of memory, evicted, stopped), or it never came to start"


def close_run(page: str, journal: str, state: str, message: str = "") -> str:
    """Write the summary of the run that the file `page` belongs to; returns it.

    `state` is what the pipeline itself says (SUCCEEDED, FAILED, CANCELLED), `message` what it says of a failure.
    """
    text = render(notes.read(journal, notes.run_of(page)), state, message)
    write_page(page, text)
    return text


def render(entries: Sequence[Entry], state: str, message: str = "") -> str:
    """The page. Steps without an entry did not run, or their output was kept from an earlier run with the same inputs.

    A task that has an entry "running" when all is over was killed.
    """
    failed = [entry for entry in entries if entry.state != "succeeded"]
    good = state == GOOD and not failed
    lines = ["# The run succeeded" if good else f"# The run did not succeed ({state.lower() or 'state unknown'})", ""]
    for entry in failed:
        lines += [f"**{entry.task} failed**: {_reason(entry)}", ""]
    if not good and not failed:
        lines += [f"{SILENT}. {message}".strip(), ""]
    lines += ["| task | state | seconds | what it says |", "|---|---|---:|---|"]
    known, steps = {entry.task: entry for entry in entries}, [step.name for step in STEPS]
    for name in ("configure", "preflight", *steps, "not-promoted"):
        if name in known:
            lines.append(_row(known[name]))
        elif name in steps:
            lines.append(f"| {name} | - | | not run, or kept from an earlier run |")
    return "\n".join([*lines, ""])


def _row(entry: Entry) -> str:
    word = "killed" if entry.state == "running" else entry.state
    return f"| {entry.task} | {word} | {entry.seconds:.0f} | {_cell(_reason(entry))} |"


def _reason(entry: Entry) -> str:
    return KILLED if entry.state == "running" else entry.text


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
