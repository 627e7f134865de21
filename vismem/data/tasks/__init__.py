"""The questions about generated scenes: one builder a task, one file a capability of the paper (its Table 1).

A builder draws a layout for which its question is well posed, or returns None and is asked again. The rationale reads
the evidence off the image in short clauses, so that a long text stands between the image and the answer. Of a task's
wordings the last two are kept from the pretrain split (`World.form`).
"""

from vismem.data.sample import Capability
from vismem.data.tasks import generation, reasoning, understanding
from vismem.data.tasks.layouts import Builder

_FILES = (
    (Capability.UNDERSTANDING, understanding.BUILDERS),
    (Capability.REASONING, reasoning.BUILDERS),
    (Capability.GENERATION, generation.BUILDERS),
)
BUILDERS: dict[str, Builder] = {task: builder for _, builders in _FILES for task, builder in builders.items()}
TASKS: dict[str, Capability] = {task: capability for capability, builders in _FILES for task in builders}
