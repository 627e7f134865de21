"""The questions about generated scenes, by what they need: each file holds one builder per task.

A builder draws a layout for which its question is well posed, or returns None and is asked again.
"""

from vismem.data.tasks import coarse, compute, detail  # noqa: F401  each registers its tasks
from vismem.data.tasks.register import BUILDERS, NEEDS, TASKS

__all__ = ["BUILDERS", "NEEDS", "TASKS"]
