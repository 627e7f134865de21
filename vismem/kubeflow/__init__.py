"""What the tasks of the Kubeflow pipeline share: parameters, the call of a step, reports, the run's summary.

The components in components/ call this and hand over their artifacts; nothing here imports kfp.
"""

from vismem.kubeflow.parameters import configure
from vismem.kubeflow.results import write_confusion
from vismem.kubeflow.summary import write_summary
from vismem.kubeflow.task import SHARED_CLAIM, SHARED_FOLDER, WORK, launch_fields, run_preflight, run_task

__all__ = [
    "SHARED_CLAIM",
    "SHARED_FOLDER",
    "WORK",
    "configure",
    "launch_fields",
    "run_preflight",
    "run_task",
    "write_confusion",
    "write_summary",
]
