"""Runs commands that depend on each other, some at a time, so that a cut run goes on where it was (`vismem study`).

What is finished is asked of each job itself. A lock that the commands inherit keeps a second run away for as long as
any process of a killed one still works.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vismem.errors import UserError
from vismem.locks import lock_folder
from vismem.provenance import git_state

TAIL = 20  # lines of a failed job's log that are shown
POLL = 0.1  # seconds
PATIENCE = 20.0  # seconds that a process has to end when it is told to
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # measured: spinning threads cost a factor of six
RECORD = "jobs.jsonl"


@dataclass(frozen=True)
class Job:
    """One command. It starts when the jobs that it `needs` are done, unless `is_done` says that it was made before.

    `timed` jobs measure seconds: they start when no other job is left, so that nothing but their like runs beside them.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    timed: bool = False
    is_done: Callable[[], bool] = lambda: False


def run_jobs(jobs: Sequence[Job], folder: Path, at_once: int, console: Console) -> None:
    """Run what is not done yet, in the order given as far as `needs` allow, at most `at_once` at a time.

    Logs go to `folder/logs/`, one line a finished job to `folder/jobs.jsonl`. A job that fails stops the others and
    raises UserError with its reason and its log's path; what is finished stays. UserError where a run is going on.
    """
    waiting, done = list(jobs), set[str]()
    running: dict[str, _Running] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with lock_folder(folder) as lock, Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(jobs))
        try:
            while waiting or running:
                while len(running) < at_once and (job := _next(waiting, running, done)) is not None:
                    waiting.remove(job)
                    if job.is_done():
                        done.add(job.name)
                        progress.advance(bar)
                    else:
                        running[job.name] = _start(job, folder, lock)
                progress.update(bar, description=escape(", ".join(running)))
                time.sleep(POLL if running else 0)
                for name, process in list(running.items()):
                    if (status := process.handle.poll()) is None:
                        continue
                    del running[name]
                    if status != 0:
                        raise _failure(name, status, process.log, console)
                    done.add(name)
                    _record(folder, name, process)
                    progress.advance(bar)
                    console.print(f"{name}: {time.time() - process.started:.0f} s", highlight=False)
        finally:
            _stop(running)


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The last record of every job that finished here: {job: {started, seconds, commit}}, times in seconds."""
    file = folder / RECORD
    lines = file.read_text().splitlines() if file.is_file() else []
    records: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        records[record.pop("job")] = record
    return records


def busy_seconds(records: Sequence[dict[str, Any]]) -> float:
    """Seconds during which at least one of the jobs ran: the wall time, without pauses between runs."""
    total, until = 0.0, 0.0
    for start, end in sorted((record["started"], record["started"] + record["seconds"]) for record in records):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


@dataclass(frozen=True)
class _Running:
    job: Job
    handle: "subprocess.Popen[bytes]"
    log: Path
    started: float
    commit: str


def _next(waiting: Sequence[Job], running: dict[str, _Running], done: set[str]) -> Job | None:
    """The first job that may start now."""
    untimed = any(not job.timed for job in [*waiting, *(process.job for process in running.values())])
    for job in waiting:
        if set(job.needs) <= done and not (job.timed and untimed):
            return job
    if waiting and not running:
        raise ValueError(f"no job can start: {', '.join(job.name for job in waiting)} need what no job makes")
    return None


def _start(job: Job, folder: Path, lock: int) -> _Running:
    log = folder / "logs" / f"{job.name.replace('/', '.')}.log"
    log.parent.mkdir(exist_ok=True)
    git = git_state()
    with log.open("wb") as file:
        handle = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, pass_fds=(lock,),
            env={**os.environ, **ONE_THREAD},
        )  # fmt: skip
    commit = f"{(git['commit'] or 'unknown')[:12]}{' with uncommitted changes' if git['dirty'] else ''}"
    return _Running(job, handle, log, time.time(), commit)


def _record(folder: Path, name: str, process: _Running) -> None:
    seconds = round(time.time() - process.started, 2)
    line = {"job": name, "started": round(process.started, 2), "seconds": seconds, "commit": process.commit}
    with (folder / RECORD).open("a") as file:
        file.write(json.dumps(line) + "\n")


def _failure(name: str, status: int, log: Path, console: Console) -> UserError:
    """What to tell: the log's end on the console, its last line in the error."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for line in lines[-TAIL:]:
        console.print(f"  {line}", style="dim", markup=False, highlight=False, soft_wrap=True)
    how = f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"
    reason = f": {lines[-1].strip()}" if lines else ""
    return UserError(f"{name} {how}{reason} (log: {log}). What is finished is kept; run the same command to go on")


def _stop(running: dict[str, _Running]) -> None:
    """Tell all processes to end, and end those that do not."""
    for process in running.values():
        process.handle.terminate()
    for process in running.values():
        try:
            process.handle.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.handle.kill()
            process.handle.wait()
