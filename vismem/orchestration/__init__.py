"""What a pipeline's tasks need beside the steps themselves: their parameters, a journal, results told in plain values.

Kubeflow's components call this and hand over what comes back; nothing here knows of Kubeflow.
"""

from vismem.orchestration.opening import look_ahead, open_run
from vismem.orchestration.parameters import parameters_of
from vismem.orchestration.results import Result, verdict_page, yes_no_confusion
from vismem.orchestration.summary import close_run
from vismem.orchestration.task import launch_fields, refusal_note, run_task

__all__ = [
    "Result",
    "close_run",
    "launch_fields",
    "look_ahead",
    "open_run",
    "parameters_of",
    "refusal_note",
    "run_task",
    "verdict_page",
    "yes_no_confusion",
]
