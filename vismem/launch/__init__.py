"""Runs a step where it is to run: in this process, in several of this machine, or on several nodes."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from vismem.config import Config
from vismem.errors import UserError
from vismem.launch.config import QUEUE, LaunchConfig
from vismem.locks import lock_folder
from vismem.ranks import is_rank
from vismem.steps import SHARED, identity, input_folders, replace_folder, run_step

__all__ = ["QUEUE", "LaunchConfig", "launch_step"]

PATIENCE = 180.0  # seconds: on a network file system the lock of a node that died outlives it for a while


def launch_step(
    name: str,
    config: Config,
    artifacts: Path,
    inputs: Mapping[str, Path] | None = None,
    launch: LaunchConfig | None = None,
    work: Path | None = None,
) -> str:
    """`vismem.steps.run_step` with the processes that `launch` names (default: this one alone); returns its line.

    UserError where a process fails, with its reason; then `artifacts/NAME` stays as it was, and the next launch resumes
    from the last checkpoint. Where `artifacts` may be gone by then, `work` names a folder that is kept, for the
    checkpoints of long steps, and whose name stands for the code that made them; UserError while another launch works
    on the same there.
    """
    launch = launch or LaunchConfig()
    if name in SHARED and launch.backend != "trainer":
        _check_gpu(name, config)
    if launch.backend != "process" and name not in SHARED:
        raise UserError(f"'{name}' runs in one process: use backend 'process'. Shared: {', '.join(SHARED)}")
    kept = launch.shared if launch.image else work if name in SHARED else None
    if kept is None:
        return _run(name, config, artifacts, inputs or {}, launch)
    if launch.image and not kept.is_dir():
        raise UserError(f"no shared volume at {kept}: mount the one that the training nodes see there")
    folders = input_folders(name, artifacts, inputs)
    made_of = identity(name, config, folders)
    if launch.image and work is not None:  # on the shared volume lies what other code has made, too
        made_of = hashlib.sha256(f"{work.name} {made_of}".encode()).hexdigest()
    place = kept / f"vismem-{name}-{made_of[:12]}"
    line = f"{name}: made before, in {place}"
    with lock_folder(place, PATIENCE):
        if not (place / name).is_dir():
            if launch.image:
                folders = {needed: _copy_once(folder, place / "inputs" / needed) for needed, folder in folders.items()}
            line = _run(name, config, place, folders, launch)
        fresh = artifacts / f"{name}.partial"
        shutil.rmtree(fresh, ignore_errors=True)  # of another run, which was killed
        shutil.copytree(place / name, fresh)
        replace_folder(fresh, artifacts / name)
        # at once: half of it is never taken for the whole
        place.rename(kept / f"{place.name}.gone-{uuid.uuid4().hex[:8]}")
        for gone in kept.glob("vismem-*.gone-*"):  # also what a kill has left
            shutil.rmtree(gone, ignore_errors=True)
    return line


def _check_gpu(name: str, config: Config) -> None:
    """UserError where the parameters ask for GPUs, or a device plugin gave some, and torch sees none."""
    import torch

    given = os.environ.get("NVIDIA_VISIBLE_DEVICES", "")
    asked = config.preflight.gpus or given.startswith(("GPU-", "MIG-"))
    if asked and not torch.cuda.is_available():
        raise UserError(
            f"{name} would run on the CPU: this machine or pod was to have GPUs (preflight.gpus "
            f"{config.preflight.gpus}, NVIDIA_VISIBLE_DEVICES '{given}'), and torch {torch.__version__} sees none. "
            "Check `nvidia-smi` and the build of torch; for the CPU set preflight.gpus=0"
        )


def _run(name: str, config: Config, artifacts: Path, inputs: Mapping[str, Path], launch: LaunchConfig) -> str:
    """The step with its output in `artifacts`, which all of its processes see."""
    if launch.backend == "process" and is_rank():
        from torch.distributed.elastic.multiprocessing.errors import record

        return str(record(run_step)(name, config, artifacts, inputs))  # what it raises goes to torchrun's error file
    if launch.backend == "process":
        return run_step(name, config, artifacts, inputs)
    if launch.backend == "torchrun":
        from vismem.launch.torchrun import run_processes

        run = partial(run_processes, launch.num_processes, run_step)
    else:
        from vismem.launch.trainer import run_locally, run_on_cluster

        run = partial(run_on_cluster if launch.image else run_locally, launch)
    try:
        return run(name, config, artifacts, inputs)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _copy_once(source: Path, target: Path) -> Path:
    """Copy a folder, unless an earlier launch did; half a copy is never taken for one. Returns the copy."""
    if not target.is_dir():
        half = target.with_name(f"{target.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(source, half)
        half.rename(target)
    return target
