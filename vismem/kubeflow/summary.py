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
WHOLE = "Every task succeeded, was kept from an earlier run, or was not needed."
NO_MESSAGE = "Kubeflow hands over no error message."
REMEDY = (
    "The failed task is red in the run's graph; its log ends with the reason. A task without a log was killed or never "
    "started (out of memory, evicted, no image, no node): `kubectl -n NAMESPACE get events` shows that. Submitted "
    "again, the run keeps what was made."
)


def write_summary(page: str, state: str, message: str = "") -> str:
    """Write the summary of a run to the file `page` and return it.

    `state` and `message` are those of dsl.PipelineTaskFinalStatus. Kubeflow's driver leaves `message` empty.
    """
    outcome = OUTCOMES.get(state.upper(), f"ended in state {state or 'unknown'}")
    details = [WHOLE] if outcome == "succeeded" else [message or NO_MESSAGE, "", REMEDY]
    text = "\n".join([f"# The run {outcome}", "", *details, ""])
    write_text(Path(page), text)
    return text
