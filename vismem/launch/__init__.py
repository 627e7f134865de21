"""Runs a step of training where it is to run: in this process, on several GPUs of this machine, or on several nodes.

Whoever launches owns the step's output: it appears when every process has done its part, and not at all otherwise.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from vismem.config import Config
from vismem.errors import UserError
from vismem.launch.desk import LINE, Job, collect_line, local_desk, shared_desk
from vismem.launch.how import BACKENDS, How
from vismem.steps import BASELINES, run_step

__all__ = ["BACKENDS", "SHARED", "How", "launch_step"]

SHARED = ("stage1", "stage2", *(step.name for step in BASELINES))  # the steps that several processes can share


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
    if name not in SHARED:
        raise UserError(f"'{name}' runs in one process: launch it with backend 'process'. Shared: {', '.join(SHARED)}")
    body = partial(_on_cluster if how.image else _on_this_machine, name, how)
    return run_step(name, config, artifacts, inputs, body=body)


def _on_this_machine(name: str, how: How, config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """The processes write to `out` themselves."""
    if how.backend == "trainer":
        from vismem.launch.trainer import run_locally as run
    else:
        from vismem.launch.machine import run_on_this_machine as run
    with local_desk() as desk:
        Job.of(name, config, inputs, out, how.world_size).write(desk)
        succeeded, log = run(desk, how.num_processes)
        return collect_line(name, desk, succeeded, log)


def _on_cluster(name: str, how: How, config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Inputs and output pass through the shared volume; a launch that failed leaves them, with checkpoints, there."""
    from vismem.launch.trainer import run_on_cluster

    identity = (out.parent / f"{out.name}.id").read_text()[:12]  # of the step with these parameters and inputs
    job_name = f"vismem-{name.replace('_', '-')}-{identity}"
    with shared_desk(how.shared / job_name, inputs, out) as (desk, there, work):
        if (desk / LINE).is_file():  # made, but the launcher was killed before it could fetch it
            return (desk / LINE).read_text()
        Job.of(name, config, there, work, how.world_size).write(desk)
        succeeded, log = run_on_cluster(job_name, desk, how)
        return collect_line(name, desk, succeeded, log)
