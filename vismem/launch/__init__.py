"""Runs a step of training where it is to run: in this process, on several GPUs of this machine, or on several nodes.

Whoever launches owns the step's output: it appears when every process has done its part, and not at all otherwise.
"""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from vismem.config import Config
from vismem.errors import UserError
from vismem.launch.desk import LINE, Job, collect_line, local_desk, shared_desk
from vismem.launch.how import BACKENDS, How
from vismem.locks import lock_folder
from vismem.steps import BASELINES, BY_NAME, StepFunction, run_step

__all__ = ["BACKENDS", "SHARED", "How", "launch_step"]

SHARED = ("stage1", "stage2", *(step.name for step in BASELINES))  # the steps that several processes can share
PATIENCE = 180.0  # seconds: on a network file system the lock of a node that died outlives it for a while
LONG = (*SHARED, "evaluate")  # those that keep checkpoints


def launch_step(
    name: str,
    config: Config,
    artifacts: Path,
    inputs: Mapping[str, Path] | None = None,
    how: How | None = None,
    work: Path | None = None,
) -> str:
    """Like `vismem.steps.run_step`, with the processes that `how` names (default: this one alone); returns its line.

    UserError where a process fails, with its reason; then `artifacts/NAME` stays as it was, and the next launch goes on
    from the last checkpoint. Where `artifacts` may be gone by then, `work` names a folder that will not be, for the
    checkpoints of long steps; UserError while another launch works on the same there.
    """
    how = how or How()
    body: StepFunction | None = None
    if how.backend != "process":
        if name not in SHARED:
            raise UserError(f"'{name}' runs in one process: use backend 'process'. Shared: {', '.join(SHARED)}")
        body = partial(_on_cluster if how.image else _on_this_machine, name, how)
    if work is not None and name in LONG and not how.image:
        body = partial(_in_work_folder, work, body or BY_NAME[name].load())
    return run_step(name, config, artifacts, inputs, body)


def _in_work_folder(work: Path, body: StepFunction, config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Have the step made in a folder below `work`, of the same name for the same parameters and inputs; fetch it."""
    place = work / _identified(out)
    with lock_folder(place, PATIENCE):
        there = place / out.name
        there.mkdir(parents=True, exist_ok=True)  # who was waited for may have cleared it
        line = body(config, inputs, there)
        shutil.copytree(there, out, dirs_exist_ok=True)
        shutil.rmtree(place)
    return line


def _identified(out: Path) -> str:
    """The step that `run_step` makes in `out`, with a hash of its parameters and inputs: `stage1-0123456789ab`."""
    return f"{out.stem.replace('_', '-')}-{(out.parent / f'{out.name}.id').read_text()[:12]}"


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

    job_name = f"vismem-{_identified(out)}"
    with shared_desk(how.shared / job_name, inputs, out) as (desk, there, work):
        if (desk / LINE).is_file():  # made, but the launcher was killed before it could fetch it
            return (desk / LINE).read_text()
        Job.of(name, config, there, work, how.world_size).write(desk)
        succeeded, log = run_on_cluster(job_name, desk, how)
        return collect_line(name, desk, succeeded, log)
