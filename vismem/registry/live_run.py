"""An MLflow run that shows a training while it runs: a child process keeps it, so that no step waits for MLflow.

The child (live_child.py) begins with the first step that runs. It is told by a line on its stdin what
happens, and closes the run when its stdin ends. `register` goes on with the run, whose id is in LIVE_RUN by then.
"""

import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from vismem.config import Config
from vismem.registry import LIVE_RUN
from vismem.steps import STEPS

REGISTER = "register"
ANSWER_SECONDS = 60.0  # for the id of the run; a registry that does not answer costs the child a few
END_SECONDS = 5.0  # for closing the run; what takes longer the child does without us, where that is possible
PIDS: list[int] = []  # of children, which end by themselves
_NAMES = [step.name for step in STEPS]
BEFORE = _NAMES[: _NAMES.index(REGISTER)]  # steps whose output makes another bundle


class LiveRun:
    """The run of one `vismem repro`, or of a task of Kubeflow. Nothing here fails where MLflow does not answer."""

    def __init__(self, config: Config, artifacts: Path, end_seconds: float = END_SECONDS) -> None:
        self.config, self.artifacts, self.end_seconds = config, artifacts, end_seconds
        self.child: subprocess.Popen[str] | None = None
        self.before: list[str] = []  # what is to be told once the child is there
        self.handed_over = False

    def begin(self, step: str) -> None:
        """A step begins to run."""
        if step in BEFORE and self.child is None and not self.handed_over:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "vismem.registry.live_child", str(self.artifacts)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                start_new_session=True,  # Ctrl-C is for us
            )
            PIDS.append(self.child.pid)
            for line in (self.config.model_dump_json(by_alias=True), *self.before):
                self._tell(line)
        curves = (self.artifacts / f"{step}.partial").glob("*.csv")  # of a killed run, perhaps of other parameters
        self._tell(f"begin {step} {max((file.stat().st_mtime_ns for file in curves), default=0)}")
        if step == REGISTER and self.child is not None and (run_id := self._answer()):
            os.environ[LIVE_RUN] = run_id

    def done(self, step: str) -> None:
        """A step has its output: it has run, or need not run."""
        self._tell(f"done {step}")
        if step == REGISTER:
            self.end("FINISHED")

    def end(self, outcome: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED, unless `register` has closed it."""
        os.environ.pop(LIVE_RUN, None)
        self._tell(f"end {outcome}")
        if self.child is not None:
            with suppress(OSError):
                self.child.stdin.close()  # type: ignore[union-attr]
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(self.end_seconds)
            self.child.stdout.close()  # type: ignore[union-attr]
        self.child, self.handed_over = None, True

    def _tell(self, line: str) -> None:
        if self.child is None:
            self.before.append(line)
        else:
            with suppress(OSError):  # it is gone: then there is no live run
                self.child.stdin.write(f"{line}\n")  # type: ignore[union-attr]

    def _answer(self) -> str:
        """The id of the run, or nothing where it could not be opened."""
        assert self.child is not None
        assert self.child.stdout is not None
        ready, _, _ = select.select([self.child.stdout], [], [], ANSWER_SECONDS)
        return self.child.stdout.readline().strip() if ready else ""
