"""Runs a step where it is to run: in this process, in several of this machine, or on several nodes."""

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
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
KEPT = 7 * 86400.0  # seconds that a work folder keeps an output for the run that made it
LEFT = 4 * KEPT  # and one without an output what is in it, for a launch that resumes


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
    on the same there. The output stays there for some days, too: Kubeflow takes it from `artifacts` only later, and
    where that fails, the next try of the same run (KFP_RUN_ID) has it again.
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
    _remove_old(kept.glob("vismem-*") if launch.image else kept.parent.glob("*/vismem-*"))  # of other code, too
    place = kept / f"vismem-{name}-{made_of[:12]}"
    line = f"{name}: made before, in {place}"
    made = place / f"{name}.run-{os.environ.get('KFP_RUN_ID', '')}"  # another run makes its own
    with lock_folder(place, PATIENCE):
        if not made.is_dir() and not (place / name).is_dir():
            if launch.image:
                folders = {needed: _copy_once(folder, place / "inputs" / needed) for needed, folder in folders.items()}
            line = _run(name, config, place, folders, launch)
        if not made.is_dir():
            (place / name).rename(made)
        fresh = artifacts / f"{name}.partial"
        shutil.rmtree(fresh, ignore_errors=True)  # of another run, which was killed
        shutil.copytree(made, fresh)
        replace_folder(fresh, artifacts / name)
        others = [other for other in place.glob(f"{name}.run-*") if other != made and _is_past(other)]
        for needless in (place / "inputs", place / "logs", *others):
            shutil.rmtree(needless, ignore_errors=True)
    return line


def _remove_old(places: Iterable[Path]) -> None:
    """Remove the work folders whose outputs are no longer kept, and what a kill has left of others."""
    for place in places:
        gone = place if ".gone-" in place.name else place.with_name(f"{place.name}.gone-{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(UserError, OSError):  # another launch works there, or has removed it
            if gone != place and _is_old(place):
                with lock_folder(place):
                    if _is_old(place):
                        place.rename(gone)  # at once: half of it is never taken for the whole
            shutil.rmtree(gone, ignore_errors=True)


def _is_old(place: Path) -> bool:
    """Whether the last output was made long ago, or where there is none, the newest file longer ago."""
    if any(place.glob("*.run-*")):
        return _is_past(place)
    return all(_is_past(path, LEFT) for path in (place, *place.rglob("*")) if path.name != "lock")  # who asks holds it


def _is_past(path: Path, seconds: float = KEPT) -> bool:
    return time.time() - path.lstat().st_mtime > seconds


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
