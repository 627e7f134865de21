"""The study's jobs: their order, what a second run skips, what a failure reports, and what a kill leaves."""

import errno
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from recipes.study.jobs import Job, busy_seconds, read_records
from recipes.study.jobs import run_jobs as run_with_lock
from vismem.errors import UserError
from vismem.locks import lock_folder

ROOT = Path(__file__).parents[2]
QUIET = Console(file=io.StringIO())


def run_jobs(jobs: Sequence[Job], folder: Path, at_once: int, console: Console = QUIET) -> None:
    with lock_folder(folder) as lock:
        run_with_lock(jobs, folder, lock, at_once, console)


def shell(folder: Path, name: str, script: str = "", *needs: str, timed: bool = False) -> Job:
    """A job that notes its start and end in `folder/trace`, and makes its folder at the end."""
    command = f"echo '+{name}' >> trace; {script or 'sleep 0.05'} && echo '-{name}' >> trace && mkdir {name}"
    return Job(name, ("sh", "-c", f"cd '{folder}' && {command}"), needs, timed)


def trace(folder: Path) -> list[str]:
    return (folder / "trace").read_text().split()


def test_a_job_starts_when_what_it_needs_is_done(tmp_path: Path) -> None:
    jobs = [shell(tmp_path, "c", "", "a", "b"), shell(tmp_path, "b", "", "a"), shell(tmp_path, "a")]
    run_jobs(jobs, tmp_path, 2)
    assert trace(tmp_path) == ["+a", "-a", "+b", "-b", "+c", "-c"]


def test_at_most_so_many_jobs_run_at_once(tmp_path: Path) -> None:
    def max_running(at_once: int) -> int:
        folder = tmp_path / str(at_once)
        folder.mkdir()
        run_jobs([shell(folder, name, "sleep 0.3") for name in "abc"], folder, at_once)
        counts, running = [], 0
        for line in trace(folder):
            running += 1 if line.startswith("+") else -1
            counts.append(running)
        return max(counts)

    assert [max_running(1), max_running(2)] == [1, 2]


def test_timed_jobs_wait_until_no_other_is_left(tmp_path: Path) -> None:
    jobs = [
        shell(tmp_path, "timed", "", "a", timed=True),
        shell(tmp_path, "a"),
        shell(tmp_path, "b", "sleep 0.3"),
        shell(tmp_path, "c", "", "b"),
    ]
    run_jobs(jobs, tmp_path, 2)
    assert trace(tmp_path)[-2:] == ["+timed", "-timed"]


def test_what_is_done_is_not_run_again(tmp_path: Path) -> None:
    jobs = [shell(tmp_path, "a"), shell(tmp_path, "b", "", "a")]
    run_jobs(jobs, tmp_path, 1)
    (tmp_path / "b").rmdir()
    run_jobs(jobs, tmp_path, 1)
    run_jobs(jobs, tmp_path, 1)
    assert trace(tmp_path) == ["+a", "-a", "+b", "-b", "+b", "-b"]


def test_a_failing_job_stops_the_others_and_says_why_and_where_its_log_is(tmp_path: Path) -> None:
    jobs = [
        shell(tmp_path, "first"),
        shell(tmp_path, "bad", "{ echo working; echo 'no luck today'; exit 3; }", "first"),
        shell(tmp_path, "long", "exec sleep 60", "first"),
        shell(tmp_path, "never", "", "bad"),
    ]
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match=r"bad exited with status 3: no luck today \(log: .*bad\.log\)"):
        run_jobs(jobs, tmp_path, 2, console)
    assert not (tmp_path / "long").exists(), "the long job was stopped"
    assert "working" in console.file.getvalue()  # type: ignore[attr-defined]
    assert (tmp_path / "first").is_dir()
    assert not (tmp_path / "never").exists()
    assert (tmp_path / "logs" / "bad.log").read_text() == "working\nno luck today\n"
    again = [Job("bad", ("mkdir", str(tmp_path / "bad")), ("first",)), *jobs[:1], *jobs[3:]]
    run_jobs(again, tmp_path, 2)
    assert trace(tmp_path).count("+first") == 1
    stopped = {name: [run["stopped"] for run in runs] for name, runs in read_records(tmp_path).items()}
    assert stopped == {"first": [False], "bad": [True, False], "long": [True], "never": [False]}


def test_a_killed_job_is_reported_with_its_signal(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was killed by signal 9"):
        run_jobs([Job("a", ("sh", "-c", "kill -9 $$"))], tmp_path, 1)


def test_a_job_that_needs_what_no_job_makes_is_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: no job makes what they need"):
        run_jobs([shell(tmp_path, "a", "", "b")], tmp_path, 1)


def test_steps_get_one_thread_each(tmp_path: Path) -> None:
    run_jobs([shell(tmp_path, "a", "echo $OMP_NUM_THREADS $OMP_WAIT_POLICY")], tmp_path, 1)
    assert (tmp_path / "logs" / "a.log").read_text() == "1 passive\n"


def test_a_second_run_is_kept_away_while_a_step_of_a_killed_one_works(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from recipes.study.jobs import Job, run_jobs; from vismem.locks import lock_folder\n"
        "job = Job('a', ('sh', '-c', 'echo $$; exec sleep 60'))\n"
        "with lock_folder(Path(sys.argv[1])) as lock:\n"
        "    run_jobs([job], Path(sys.argv[1]), lock, 1, Console(quiet=True))"
    )
    runner = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    log = tmp_path / "logs" / "a.log"
    until = time.monotonic() + 60
    while not (log.is_file() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    runner.kill()
    runner.wait()
    step = int(log.read_text())
    try:
        with pytest.raises(UserError, match="is in use: another run works there, or a step of one that was killed"):
            run_jobs([shell(tmp_path, "b")], tmp_path, 1)
    finally:
        subprocess.run(["kill", f"-{signal.SIGKILL}", str(step)], check=True)
    for _ in range(100):  # the kernel takes a moment
        try:
            run_jobs([shell(tmp_path, "b")], tmp_path, 1)
            break
        except UserError:
            time.sleep(0.05)
    assert trace(tmp_path) == ["+b", "-b"]


def test_a_lock_is_waited_for_as_long_as_one_has_patience(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        with pytest.raises(UserError, match="is in use"), lock_folder(tmp_path, 0.2):
            pass
        program = (
            "import sys, pathlib, vismem.locks as l\nwith l.lock_folder(pathlib.Path(sys.argv[1]), 60): print('mine')"
        )
        waiting = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(2)
    assert waiting.communicate() == ("mine\n", None)


def test_a_file_system_without_locks_is_named_and_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with lock_folder(tmp_path):
        assert "without locks" in capsys.readouterr().err


def test_records_keep_what_made_each_job_and_survive_a_truncated_line(tmp_path: Path) -> None:
    rows = [
        {"job": "a", "started": start, "seconds": seconds, "stopped": stopped}
        for start, seconds, stopped in ((0, 1, True), (5, 2, False), (10, 3, True), (15, 4, True), (20, 5, False))
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"job": "b", "sta')
    assert read_records(tmp_path) == {"a": rows[2:]}, "the first two made an output that was deleted since"


def test_busy_seconds_count_overlaps_once_and_no_pauses() -> None:
    spans = [(100, 10), (105, 10), (106, 2), (109, 8), (1000, 5)]
    assert busy_seconds([{"started": start, "seconds": seconds} for start, seconds in spans]) == 22
    assert busy_seconds([]) == 0
