"""What passes between a launcher and its processes: files in a folder that all of them see, the desk.

The launcher puts the job there; the main process leaves the step's line, a process that fails its reason.
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vismem.config import Config
from vismem.errors import UserError

JOB, LINE, LOCK, FAILED = "job.json", "line", "launcher", "failed."
SHOWN = 20  # lines of a log in an error
PATIENCE = 60.0  # seconds in which a file that another machine wrote appears here


@dataclass(frozen=True)
class Job:
    """What a process has to know."""

    step: str
    config: dict[str, Any]
    inputs: dict[str, str]
    out: str
    world_size: int

    @classmethod
    def of(cls, step: str, config: Config, inputs: Mapping[str, Path], out: Path, world_size: int) -> "Job":
        """The job of running a step."""
        folders = {name: str(folder.absolute()) for name, folder in inputs.items()}
        return cls(step, config.model_dump(mode="json", by_alias=True), folders, str(out.absolute()), world_size)

    def write(self, desk: Path) -> None:
        """Put it on the desk."""
        (desk / JOB).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, desk: Path) -> "Job":
        """What `write` put there."""
        return cls(**json.loads((desk / JOB).read_text()))


@contextmanager
def local_desk() -> Iterator[Path]:
    """A desk on this machine, locked for as long as the launcher lives; its processes end when it is unlocked."""
    with TemporaryDirectory(prefix="vismem-") as folder, (Path(folder) / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(folder)


@contextmanager
def shared_desk(place: Path, inputs: Mapping[str, Path], out: Path) -> Iterator[tuple[Path, dict[str, Path], Path]]:
    """A desk, the inputs and a folder to work in, below `place` on a volume that all nodes see.

    On success what was made there is copied to `out` and `place` is cleared; else it stays for the next launch.
    UserError where the volume is not mounted.
    """
    if not place.parent.is_dir():
        raise UserError(f"no shared volume at {place.parent}: mount the one that the training nodes see there")
    desk, work = place / "desk", place / "work"
    there = {name: place / "inputs" / name for name in inputs}
    for name, folder in inputs.items():
        _copy_once(folder, there[name])
    for folder in (desk, work):
        folder.mkdir(parents=True, exist_ok=True)
    for old in desk.glob(f"{FAILED}*"):
        old.unlink()
    yield desk, there, work
    shutil.copytree(work, out, dirs_exist_ok=True)
    shutil.rmtree(place)


def _copy_once(source: Path, target: Path) -> None:
    """Copy a folder, unless an earlier launch did; half a copy is never taken for one."""
    if target.is_dir():
        return
    half = target.with_name(f"{target.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(source, half)
    half.rename(target)


def wait_for_unlocking(desk: Path) -> None:
    """Return once the launcher is done or dead, however it died."""
    with (desk / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)


def leave_reason(desk: Path, reason: str) -> None:
    """Say why this process fails."""
    (desk / f"{FAILED}{os.environ.get('RANK', '0')}").write_text(reason)


def collect_line(step: str, desk: Path, succeeded: bool, log: str) -> str:
    """The step's line. UserError with the reason of the process that failed first, or with the end of the log."""
    if not succeeded:
        raise UserError(f"{step}: {_first_reason(desk, log)}")
    until = time.monotonic() + PATIENCE
    while not (desk / LINE).is_file() and time.monotonic() < until:
        time.sleep(1)
    return (desk / LINE).read_text()


def _first_reason(desk: Path, log: str) -> str:
    if killed := re.search(r"exitcode +: -(?!15\b)(\d+)", log):  # torchrun's report; 15: its own doing, to the others
        return f"a process was killed by signal {killed[1]} (9: often for want of memory). Launch again to go on"
    reasons = sorted(desk.glob(f"{FAILED}*"), key=lambda file: file.stat().st_mtime_ns)
    return reasons[0].read_text() if reasons else "the end of its log: " + "\n".join(log.splitlines()[-SHOWN:])
