"""`vismem repro`: DVC runs the steps, and this says how far they are. `dvc repro` does the same and says it DVC's way.

DVC runs in this process and reports by its logger; each step is a process that writes to our terminal itself.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from signal import Signals
from typing import Any

import yaml
from rich.console import Console

from vismem.config import Config, load_config
from vismem.data.source_files import record_outside
from vismem.disk import explain_full_disk
from vismem.errors import UserError
from vismem.locks import lock_file
from vismem.preflight import check_disk, data_gb
from vismem.progress import about
from vismem.registry.live_run import PIDS, LiveRun
from vismem.services import environment, exit_on_sigterm
from vismem.times import Times
from vismem.workspace import PLACE, make_workspace

INTERRUPTED = 130
RUNNING, CACHED = "Running stage '%s':", "Stage '%s' is cached - skipping run, checking out outputs"  # DVC's log
UNCHANGED = "Stage '%s' didn't change, skipping"
HAD_BEEN_KILLED = "Process '%s' with (Pid %s), in RWLock-file"  # it has cleared away what a killed run left


def repro(
    params: Path, profile: str | None, arguments: Sequence[str], overrides: Mapping[str, Any] | None = None
) -> int:
    """Run the pipeline in the root, or in the workspace of a profile or overrides; return the exit status.

    `arguments` are those of `dvc repro`. UserError where DVC is missing, another run is in the same folder, the disk
    has too little space for the run, or DVC fails. A failed step has said itself why.
    """
    if find_spec("dvc") is None:
        raise UserError("DVC is not installed here: pip install 'vismem[pipeline]', or run the steps one by one")
    load_config(params, profile, overrides)  # before DVC, whose message would be longer and less plain
    root = params.resolve().parent
    folder = make_workspace(params, profile, overrides) if profile or overrides else root
    for needed in ("dvc.yaml", ".dvc"):
        if not (folder / needed).exists():
            raise UserError(f"no {needed} in {root}: run in the project's root, or name it with --params")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    shown = os.path.relpath(folder)
    with (
        lock_file(folder / PLACE / "lock", "this folder" if shown == "." else shown),
        chdir(folder),
        environment({"PATH": path}),
        exit_on_sigterm(),
        _no_orphans(),
    ):
        record_outside(load_config(Path("params.yaml")))
        return _run_dvc(arguments)


def _run_dvc(arguments: Sequence[str]) -> int:
    from dvc.cli import DvcParserError, parse_args
    from dvc.exceptions import DvcException, ReproductionError

    try:
        options = parse_args(["repro", *arguments])
    except DvcParserError:
        return 2  # it has said what it does not know
    if options.dry:
        try:
            return int(options.func(options).do_run())
        except DvcException as error:
            raise UserError(_one_line(error.__cause__ or error)) from error
    shown = Display(load_config(Path("params.yaml")), quiet=options.quiet > 0, whole=not options.targets)
    outcome = "FAILED"
    try:
        with dvc_events(shown, options.verbose > 0), explain_full_disk(PLACE.parent.parent, Path("artifacts")):
            options.func(options).do_run()
        outcome = "FINISHED"
    except ReproductionError as error:
        cause = error.__cause__
        status = _exit_status(cause)
        if status is None:
            raise UserError(_one_line(cause or error)) from error
        if status == INTERRUPTED:
            outcome = "KILLED"
        elif status != 1:  # it was killed, so that it could not say why
            raise UserError(f"{shown.step} ended with status {status}, {_reason(status)}; repeat to resume") from None
        return status
    except DvcException as error:
        raise UserError(_one_line(error)) from error
    except (KeyboardInterrupt, SystemExit):
        outcome = "KILLED"
        raise
    finally:
        shown.end(outcome)
    return 0


class Display:
    """What a run shows: a line as each step begins or is left out. It also keeps their times and the live MLflow run.

    `whole`: the run goes through all steps, so that the time left can be told.
    """

    def __init__(self, config: Config, *, quiet: bool, whole: bool) -> None:
        self.config, self.whole = config, whole
        self.steps = _step_names(Path("dvc.yaml"))
        self.times, self.live = Times(PLACE / "seconds.json", config), LiveRun(config, Path("artifacts"))
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.step, self.began, self.ran = "", time.monotonic(), 0

    def running(self, name: str) -> None:
        """A step begins. UserError where it is the first and the disk has too little space for a run."""
        self._close()
        if self.ran == 0:
            artifacts, wanted = Path("artifacts"), self.config.preflight.free_disk_gb
            disk = check_disk(artifacts, wanted, data_gb(self.config, artifacts))
            if not disk.ok:
                raise UserError(f"too little disk space for a run: {disk.seen}; {disk.remedy}")
        self.step, self.ran = name, self.ran + 1
        place = self.steps.index(name) if name in self.steps else 0
        left = self.times.left(self.steps[place:]) if self.whole else None
        self._print(name, f"[bold]{name}[/]" + (f", {about(left)} left" if left is not None else ""))
        self.live.begin(name)
        self.times.begin(name)

    def skipped(self, name: str, why: str) -> None:
        """A step need not run."""
        self._close()
        if name in self.steps:  # not data that DVC keeps
            self._print(name, f"{name}, {why}")
        self.live.done(name)

    def end(self, outcome: str) -> None:
        """The run has ended: FINISHED, FAILED or KILLED."""
        if outcome == "FINISHED":
            self._close()
            minutes, seconds = divmod(round(time.monotonic() - self.began), 60)
            took = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
            self.console.print(f"done in {took}" if self.ran else "nothing to do: every step is unchanged")
        self.live.end(outcome)

    def _close(self) -> None:
        if self.step:
            self.times.end()
            self.live.done(self.step)
        self.step = ""

    def _print(self, name: str, text: str) -> None:
        place = f"step {self.steps.index(name) + 1} of {len(self.steps)}: " if name in self.steps else ""
        self.console.print(place + text)
        sys.stdout.flush()  # before what the step writes


class _Events(logging.Handler):
    """DVC's log as calls of `Display`; of the rest, warnings are shown."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Handle one message; what is raised ends DVC's run."""
        if record.msg == RUNNING:
            self.display.running(str(record.args[0]))  # type: ignore[index]
        elif record.msg in (UNCHANGED, CACHED):
            why = "unchanged" if record.msg == UNCHANGED else "made by an earlier run"
            self.display.skipped(str(record.args[0]), why)  # type: ignore[index]
        elif record.levelno >= logging.WARNING and not str(record.msg).startswith(HAD_BEEN_KILLED):
            print(" ".join(record.getMessage().split()), file=sys.stderr, flush=True)


@contextmanager
def dvc_events(display: Display, verbose: bool) -> Iterator[None]:
    """A block in which DVC tells `display`, and nothing else unless it is to be verbose, what it does."""
    logger, bars = logging.getLogger("dvc"), logging.getLogger("dvc.progress")
    handlers, level, bars_level = logger.handlers, logger.level, bars.level
    logger.handlers = [_Events(display), *(handlers if verbose else ())]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    bars.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
        bars.setLevel(bars_level)


@contextmanager
def _no_orphans() -> Iterator[None]:
    """A block that stops the step that runs where SIGTERM ends it."""
    import psutil

    try:
        yield
    except SystemExit:
        steps = [child for child in psutil.Process().children(recursive=True) if child.pid not in PIDS]
        for step in steps:
            with suppress(psutil.NoSuchProcess):
                step.terminate()
        psutil.wait_procs(steps, timeout=10)
        raise


def _step_names(file: Path) -> list[str]:
    """The pipeline's steps in order; of a file that is broken, none: DVC says what is wrong with it."""
    try:
        return list(yaml.safe_load(file.read_text())["stages"])
    except (yaml.YAMLError, KeyError, TypeError):
        return []


def _exit_status(error: BaseException | None) -> int | None:
    """The status of the step that failed, or None where something else did."""
    from dvc.stage.exceptions import StageCmdFailedError

    if not isinstance(error, StageCmdFailedError):
        return None
    return int(str(error).rpartition(" ")[2])


def _reason(status: int) -> str:
    number = -status if status < 0 else status - 128
    names = {signal.value: signal.name for signal in Signals}
    said = f"killed by {names[number]}" if number in names else "see above"
    return said + (" (often for want of memory)" if number == Signals.SIGKILL else "")


def _one_line(error: BaseException) -> str:
    """What DVC says, without its advice to remove locks by hand."""
    return " ".join(str(error).partition("\n\nIf there are no processes")[0].split())
