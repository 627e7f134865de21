"""Runs commands that depend on each other, a few at a time. A job is done when its output folder is there."""

import json
import os
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from vismem.errors import UserError
from vismem.provenance import git_state

TAIL = 20  # lines of a failed job's log that are shown
POLL = 0.1  # seconds between looks at the running jobs
STOP_SECONDS = 20.0  # that a process has to exit after SIGTERM
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # measured: spinning threads cost a factor of six
RECORDS = "jobs.jsonl"

Record = dict[str, Any]  # job, started (a timestamp), seconds, commit, stopped (before its end)


@dataclass(frozen=True)
class Job:
    """One command. On success it moves its output to the folder `name`, relative to the folder of all jobs.

    It starts when the outputs of the jobs in `needs` are there. `timed` jobs measure seconds: they start when all
    others are done.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    timed: bool = False


def run_jobs(jobs: Sequence[Job], folder: Path, lock: int, at_once: int, console: Console) -> None:
    """Run the jobs whose output is missing, in the given order as far as `needs` allow, at most `at_once` at a time.

    Logs go to `folder/logs/`, one line per run of a job to `folder/jobs.jsonl`. All jobs inherit the file descriptor
    `lock`. A job that fails stops the others and raises UserError with its reason and its log's path.
    """
    running: dict[subprocess.Popen[bytes], Record] = {}
    with console.status("") as status:
        try:
            for timed in (False, True):
                waiting = [job for job in jobs if job.timed == timed and not (folder / job.name).is_dir()]
                while waiting or running:
                    names = [record["job"] for record in running.values()]  # their output may be there already
                    made = {n for job in waiting for n in job.needs if (folder / n).is_dir()}.difference(names)
                    ready = [job for job in waiting if made.issuperset(job.needs)]
                    for job in ready[: at_once - len(running)]:
                        waiting.remove(job)
                        process, record = _start(job, folder, lock)
                        running[process] = record
                    if not running:
                        raise ValueError(f"{', '.join(job.name for job in waiting)}: no job makes what they need")
                    shown = ", ".join(record["job"] for record in running.values())
                    status.update(escape(f"{shown} ({len(waiting) + len(running)} jobs left)"))
                    time.sleep(POLL)
                    for process in [process for process in running if process.poll() is not None]:
                        _finish(process.returncode, running.pop(process), folder, console)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            for record in running.values():
                _keep(record, folder, stopped=True)


def read_records(folder: Path) -> dict[str, list[Record]]:
    """The runs behind each output in `folder`, by its job: those that were stopped, then the one that ended."""
    file, records = folder / RECORDS, dict[str, list[Record]]()
    for line in file.read_text().splitlines() if file.is_file() else []:
        with suppress(ValueError):  # truncated by a kill
            record = json.loads(line)
            runs = records.setdefault(record["job"], [])
            if runs and not runs[-1].get("stopped"):  # made anew
                runs.clear()
            runs.append(record)
    return records


def busy_seconds(records: Iterable[Record]) -> float:
    """Seconds during which at least one of the jobs ran: the wall time, without pauses between runs."""
    total, until = 0.0, 0.0
    for start, end in sorted((record["started"], record["started"] + record["seconds"]) for record in records):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name.replace('/', '.')}.log"


def _start(job: Job, folder: Path, lock: int) -> tuple[subprocess.Popen[bytes], Record]:
    log, git, environment = _log(folder, job.name), git_state(), {**os.environ, **ONE_THREAD}
    log.parent.mkdir(exist_ok=True)
    commit = (git["commit"] or "unknown")[:12] + (" with uncommitted changes" if git["dirty"] else "")
    with log.open("wb") as out:
        no_input, errors = subprocess.DEVNULL, subprocess.STDOUT
        process = subprocess.Popen(
            job.command, stdin=no_input, stdout=out, stderr=errors, pass_fds=(lock,), env=environment
        )
    return process, {"job": job.name, "started": round(time.time(), 2), "commit": commit}


def _finish(status: int, record: Record, folder: Path, console: Console) -> None:
    """Keep the record of a job. UserError for one that failed; the end of its log is printed."""
    name, log = record["job"], _log(folder, record["job"])
    _keep(record, folder, stopped=status != 0)
    if status == 0:
        console.print(f"{name}: {record['seconds']:.0f} s", highlight=False)
        return
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for line in lines[-TAIL:]:
        console.print(f"  {line}", style="dim", markup=False, highlight=False, soft_wrap=True)
    how = f"exited with status {status}" if status > 0 else f"was killed by signal {-status}"
    reason = f": {lines[-1].strip()}" if lines else ""
    raise UserError(f"{name} {how}{reason} (log: {log}). Finished jobs are kept; run the same command again to resume")


def _keep(record: Record, folder: Path, stopped: bool) -> None:
    record |= {"seconds": round(time.time() - record["started"], 2), "stopped": stopped}
    with (folder / RECORDS).open("a") as file:
        file.write(json.dumps(record) + "\n")
