"""The child of `vismem repro` that keeps an MLflow run of the training: live_run.py starts it.

Every step has a nested run, with its parameters, its curves, what it uses of the machine and how it ended. What is new
in the curves that the steps write is sent every few seconds. Where the store does not answer the child tries again; no
training waits for it. Of a task of Kubeflow it keeps the run that Kubeflow has opened for the task.
"""

import json
import logging
import os
import queue
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from vismem.config import Config, parse_config
from vismem.errors import UserError, mask_credentials, one_line
from vismem.provenance import git_state, origin_tags
from vismem.registry import GIVEN_RUN
from vismem.registry.runs import Point, log_params, log_points, now, read_curve
from vismem.registry.tracking import IMPATIENT, Store, experiment_id, open_store, tag_is
from vismem.services import environment
from vismem.steps import BY_NAME

SYSTEM_METRICS = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"  # "false": none
SECONDS = 2.0  # between two looks at the curves
WORKSPACE = "vismem.workspace"  # tag of a run that is open: where it trains


class Curves:
    """The points of the curves that were not sent yet."""

    def __init__(self, artifacts: Path) -> None:
        self.artifacts = artifacts
        self.folder: Path | None = None  # of the step that runs
        self.old = 0  # the time of the newest file that was there before it began, in ns
        self.points: list[tuple[str, Point]] = []  # each with the step that wrote it
        self.last: dict[str, int] = {}  # the last step read, by curve

    def begin(self, step: str, old: int) -> None:
        """A step begins to run; its files that are not newer than `old` are of a killed run."""
        self.folder, self.old = self.artifacts / f"{step}.partial", old

    def done(self, step: str) -> None:
        """A step has its output."""
        self._read(step, self.artifacts / step, 0)
        self.folder = None

    def look(self) -> None:
        """Read what is new of the step that runs."""
        if self.folder is not None:
            self._read(self.folder.stem, self.folder, self.old)

    def _read(self, step: str, folder: Path, old: int) -> None:
        with suppress(FileNotFoundError):  # the step ends at this moment
            for file in sorted(folder.glob("*.csv")):
                if file.stat().st_mtime_ns <= old:
                    continue
                new = [point for point in read_curve(file) if point[2] > self.last.get(file.stem, -1)]
                self.points += [(step, point) for point in new]
                self.last[file.stem] = max((point[2] for point in new), default=self.last.get(file.stem, -1))


@dataclass
class Stage:
    """A step that runs or has ended, and its run once the store has one."""

    step: str
    began: int = field(default_factory=now)
    run_id: str = ""
    monitor: SystemMetricsMonitor | None = None
    ended: tuple[str, int] | None = None  # how and when


class Run:
    """The run in the store, opened as soon as that answers, and those of the stages below it."""

    def __init__(self, config: Config, artifacts: Path) -> None:
        self.config, self.curves = config.registry, Curves(artifacts)
        self.values = config.model_dump(mode="json", by_alias=True)
        self.workspace = f"{socket.gethostname()}:{artifacts.resolve()}"
        self.store: Store | None = None
        self.given = os.environ.get(GIVEN_RUN, "")  # whoever opened it closes it
        self.run_id = ""
        self.stages: list[Stage] = []  # that the store does not know to have ended
        self.told = False

    def begin(self, step: str, old: int) -> None:
        """A step begins to run; see `Curves.begin`."""
        self.curves.begin(step, old)
        self.stages.append(Stage(step))

    def end(self, outcome: str) -> None:
        """The step that runs, if one does, has ended."""
        for stage in self.stages:
            stage.ended = stage.ended or (outcome, now())

    def update(self) -> bool:
        """Send what is new; whether the store has everything."""
        self.curves.look()
        try:
            with environment(IMPATIENT):
                if not self.run_id:
                    self._open()
                assert self.store is not None
                log_points(self.store, self.run_id, [point for _, point in self.curves.points])
                for stage in self.stages:
                    self._update_stage(self.store, stage)
                self.stages = [stage for stage in self.stages if not stage.ended]
                self.curves.points = []
        except (UserError, MlflowException, OSError) as error:
            if not self.told:
                said = mask_credentials(one_line(error))
                print(f"no live curves: {said}; the training goes on without", file=sys.stderr, flush=True)
            self.told = True
            return False
        return True

    def hand_over(self) -> str:
        """The run's id, when all is sent; nothing where that cannot be done."""
        if not self.update():
            return ""
        with suppress(MlflowException):
            self.store.client.delete_tag(self.run_id, WORKSPACE)  # type: ignore[union-attr]
        return self.run_id

    def close(self, outcome: str) -> None:
        """End the run and that of the step that runs, unless they have ended or the run was given to us."""
        self.end(outcome)
        self.update()
        if self.store and self.run_id and not self.given:
            with environment(IMPATIENT), suppress(MlflowException):
                if self.store.client.get_run(self.run_id).info.status == "RUNNING":
                    self.store.client.set_terminated(self.run_id, outcome)

    def _open(self) -> None:
        """Open the run; one that still says RUNNING in this workspace was left by a killed process, and ends KILLED."""
        self.store = store = open_store(self.config)
        if self.given:
            log_params(store, self.given, self.values)
            self.run_id = self.given
            return
        experiment = experiment_id(store)
        mine = f"attributes.status = 'RUNNING' and {tag_is(WORKSPACE, self.workspace)}"
        for left in store.client.search_runs([experiment], mine):
            store.client.set_terminated(left.info.run_id, "KILLED")
        tags = {WORKSPACE: self.workspace, "mlflow.source.name": "vismem repro", **origin_tags()}
        tags["mlflow.source.git.commit"] = str(git_state()["commit"] or "unknown")
        made = store.client.create_run(experiment, tags=tags, run_name=f"{store.model} in training")
        log_params(store, str(made.info.run_id), self.values)
        self.run_id = str(made.info.run_id)

    def _update_stage(self, store: Store, stage: Stage) -> None:
        """Bring the stage's run to where the stage is."""
        stage.run_id = stage.run_id or self.given
        if not stage.run_id:
            tags = {MLFLOW_PARENT_RUN_ID: self.run_id, WORKSPACE: self.workspace, "mlflow.source.name": "vismem repro"}
            made = store.client.create_run(experiment_id(store), stage.began, tags, stage.step)
            stage.run_id = str(made.info.run_id)
            sections = BY_NAME[stage.step].sections if stage.step in BY_NAME else ()  # dvc.yaml may have others
            log_params(store, stage.run_id, {key: self.values[key] for key in sections})
        if stage.monitor is None and not stage.ended and os.environ.get(SYSTEM_METRICS, "").lower() != "false":
            stage.monitor = SystemMetricsMonitor(stage.run_id, tracking_uri=store.client.tracking_uri)
            stage.monitor.start()
        if stage.ended and stage.monitor:
            stage.monitor.finish()
        if not self.given:
            log_points(store, stage.run_id, [point for step, point in self.curves.points if step == stage.step])
            if stage.ended:
                store.client.set_terminated(stage.run_id, *stage.ended)


def follow(run: Run, told: TextIO, answer: TextIO) -> None:
    """Keep the run until `told` ends; without a last line that says how, the parent was killed."""
    outcome = "KILLED"
    for line in _lines(told):
        match line.split():
            case ["begin", "register", _]:
                print(run.hand_over(), file=answer, flush=True)
            case ["begin", step, old]:
                run.begin(step, int(old))
            case ["done", step]:
                run.curves.done(step)
                run.end("FINISHED")
            case ["end", outcome]:
                break
            case _:
                run.update()
    run.close(outcome)


def _lines(told: TextIO) -> Iterator[str]:
    """The lines, and an empty one whenever none came for SECONDS."""
    waiting: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in told:
            waiting.put(line.strip())
        waiting.put("end KILLED")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            yield waiting.get(timeout=SECONDS)
        except queue.Empty:
            yield ""


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # what matters is said in one line
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    follow(Run(parse_config(json.loads(sys.stdin.readline())), Path(sys.argv[1])), sys.stdin, answers)
