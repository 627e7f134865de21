"""Runs a step of training where it is to run: in this process, on several GPUs of this machine, or on several nodes.

Whoever launches owns the step's output: it appears when every process has done its part, and not at all otherwise.
"""

from collections.abc import Mapping
from pathlib import Path

from vismem.config import Config
from vismem.errors import UserError
from vismem.launch.how import BACKENDS, How
from vismem.steps import run_step

__all__ = ["BACKENDS", "How", "launch_step"]


def launch_step(
    name: str, config: Config, artifacts: Path, inputs: Mapping[str, Path] | None = None, how: How | None = None
) -> str:
    """Like `vismem.steps.run_step`, with the processes that `how` names (default: this one alone); returns its line.

    UserError where a process fails, with its reason; then `artifacts/NAME` stays as it was, and the next launch goes on
    from the last checkpoint.
    """
    how = how or How()
    if how.backend == "process":
        return run_step(name, config, artifacts, inputs)
    raise UserError(f"backend '{how.backend}' is not there yet")
