"""The run's summary as Markdown, from the state that Kubeflow hands to the exit task."""

from pathlib import Path

from vismem.files import write_text

OUTCOMES = {  # the driver says COMPLETE (ML Metadata's word), the API server and the local runner SUCCEEDED
    "COMPLETE": "succeeded",
    "SUCCEEDED": "succeeded",
    "CACHED": "succeeded",
    "FAILED": "failed",
    "CANCELED": "was canceled",
    "CANCELLED": "was canceled",
    "CANCELING": "was canceled",
}
NO_MESSAGE = "Kubeflow hands over no error message."
REMEDY = (
    "In the graph of the run the failed task is red; its log ends with the reason. A task without a log was never "
    "started or was killed (no image, no node, out of memory, evicted): `kubectl -n NAMESPACE get events` shows that. "
    "Submitted again, the run keeps what earlier tasks made."
)


def write_summary(page: str, state: str, message: str = "", run: str = "") -> str:
    """Write the summary of a run to the file `page` and return it.

    `state` and `message` are those of dsl.PipelineTaskFinalStatus; Kubeflow's driver leaves `message` empty.
    """
    named = f"The run {run}".strip()
    outcome = OUTCOMES.get(state.upper())
    if outcome == "succeeded":
        lines = [f"# {named} succeeded", "", "Every task succeeded, was kept from an earlier run, or was not needed."]
    elif outcome == "was canceled":
        lines = [f"# {named} was canceled", "", message or "It was stopped before its end."]
    elif outcome == "failed":
        lines = [f"# {named} failed", "", message or NO_MESSAGE, "", REMEDY]
    else:
        lines = [f"# {named} ended in state {state or 'unknown'}", "", message or NO_MESSAGE, "", REMEDY]
    text = "\n".join([*lines, ""])
    write_text(Path(page), text)
    return text
