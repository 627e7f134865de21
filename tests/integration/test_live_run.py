"""The MLflow run that shows a training while it runs, on a real store; the child's lines are written by the tests."""

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pytest
from project import Project

from vismem.registry import LIVE_RUN, live_child
from vismem.registry.live_child import Curves, Run, follow
from vismem.registry.tracking import experiment_id

CURVE = "step,reward,kl\n0,0.25,\n1,0.5,0.01\n"  # of the Project's bundle


def write_curve(project: Project, folder: str, text: str, name: str = "stage1") -> None:
    file = project.artifacts / folder / f"{name}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


class Child:
    """`follow` in a thread; `tell` returns when it has heard all lines so far."""

    def __init__(self, told: TextIO, answer: io.StringIO) -> None:
        self.told, self.answer = told, answer

    def tell(self, *lines: str) -> None:
        for line in lines:
            self.told.write(f"{line}\n")
            self.told.flush()

    def hand_over(self) -> str:
        """The id that `register` gets."""
        self.tell("begin register 0")
        with self.answered:
            self.answered.wait_for(lambda: self.answer.getvalue().endswith("\n"), 60)
        return self.answer.getvalue().strip()

    answered = threading.Condition()


class Answer(io.StringIO):
    def flush(self) -> None:
        with Child.answered:
            Child.answered.notify_all()


@contextmanager
def child(project: Project) -> Iterator[Child]:
    """A child on the project's store, told by the block, with which its stdin ends."""
    ours, theirs = os.pipe()
    answer = Answer()
    with os.fdopen(ours) as told, os.fdopen(theirs, "w") as writer:
        thread = threading.Thread(target=follow, args=(Run(project.config, project.artifacts), told, answer))
        thread.start()
        try:
            yield Child(writer, answer)
        finally:
            writer.close()
            thread.join()


def runs(project: Project, parent: str | None = None) -> list[Any]:
    """The runs of pipelines, or those of one's stages."""
    store = project.store
    found = store.client.search_runs([experiment_id(store)])
    return [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent]


def state(project: Project, run_id: str) -> dict[str, Any]:
    """All that a run holds, but for times and ids."""
    client = project.store.client
    run = client.get_run(run_id)
    curves = {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
        for name in run.data.metrics
    }
    files = {item.path for folder in (None, "evaluate", "validate") for item in client.list_artifacts(run_id, folder)}
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "tags": run.data.tags,
        "params": run.data.params,
        "curves": curves,
        "files": files,
    }


def test_register_goes_on_with_the_live_run_and_leaves_it_as_one_of_its_own(
    project: Project, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Project(tmp_path / "alone")
    (tmp_path / "alone" / "mlflow.db").write_bytes(empty_database.read_bytes())
    for one in (alone, project):
        one.build(b"one")
    monkeypatch.setattr(live_child, "SECONDS", 0.01)
    with child(project) as told:
        told.tell("begin stage1 0")
        write_curve(project, "stage1.partial", "step,reward,kl\n0,0.25,\n")
        run_id = wait_for_metric(project, "stage1/reward", 0.25)
        assert project.store.client.get_run(run_id).info.status == "RUNNING"
        write_curve(project, "stage1.partial", CURVE)
        assert wait_for_metric(project, "stage1/reward", 0.5) == run_id
        assert told.hand_over() == run_id
        monkeypatch.setenv(LIVE_RUN, run_id)
        assert project.run("register")["run_id"] == run_id
        told.tell("end FINISHED")
    monkeypatch.delenv(LIVE_RUN)
    theirs, ours = state(alone, alone.run("register")["run_id"]), state(project, run_id)
    for one in (ours, theirs):
        one["params"].pop("registry.tracking_uri")
    assert ours == theirs
    assert ours["curves"]["stage1/reward"] == [(0, 0.25), (1, 0.5)]


def wait_for_metric(project: Project, name: str, value: float) -> str:
    """The id of the run whose metric has reached the value."""
    waited = threading.Event()
    for _ in range(500):
        for run in runs(project):
            if run.data.metrics.get(name) == value:
                return str(run.info.run_id)
        waited.wait(0.02)
    raise AssertionError(f"{name} never was {value}")


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["begin stage1 0", "end FAILED"], "FAILED"),
        (["begin stage1 0"], "KILLED"),
        (["begin stage1 0", "end FINISHED"], "FINISHED"),
    ],
)
def test_a_run_ends_as_the_pipeline_did_and_killed_where_nobody_says(
    project: Project, lines: list[str], status: str
) -> None:
    with child(project) as told:
        told.tell(*lines)
    (parent,) = runs(project)
    (stage,) = runs(project, parent.info.run_id)
    assert (parent.info.status, stage.info.status, stage.info.run_name) == (status, status, "stage1")


def test_the_next_run_closes_what_a_killed_child_left_and_no_other_workspace_s(
    project: Project, tmp_path: Path
) -> None:
    for folder in ("artifacts", "other/artifacts"):
        assert Run(project.config, tmp_path / folder).update()
    with child(project) as told:
        told.tell("begin stage1 0", "end FINISHED")
    assert sorted(run.info.status for run in runs(project)) == ["FINISHED", "KILLED", "RUNNING"]


@pytest.mark.parametrize("change", ["params", "ended", "unknown"])
def test_register_opens_its_own_run_where_the_live_one_is_not_its(
    project: Project, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    project.build(b"one")
    with child(project) as told:
        told.tell("begin stage1 0")
        live = told.hand_over()
        if change == "params":
            project.config = project.config.model_copy(update={"seed": 7})
        if change == "ended":
            project.store.client.set_terminated(live, "KILLED")
        monkeypatch.setenv(LIVE_RUN, "5" * 32 if change == "unknown" else live)
        assert project.run("register")["run_id"] != live
        told.tell("end FINISHED")
    assert sorted(run.info.status for run in runs(project)) == sorted(
        ["FINISHED", "KILLED" if change == "ended" else "FINISHED"]
    )


def test_a_registry_that_does_not_answer_is_said_once_and_no_run_is_handed_over(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_child, "SECONDS", 0.01)
    nowhere = project.config.registry.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    project.config = project.config.model_copy(update={"registry": nowhere})
    with child(project) as told:
        told.tell("begin stage1 0", "done stage1")
        assert told.hand_over() == ""
        told.tell("end FAILED")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no live curves: the MLflow store http://127.0.0.1:9 does not answer")


def test_a_step_that_ends_while_its_curves_are_looked_for_harms_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = Curves(project.artifacts)
    curves.begin("stage1", 0)
    write_curve(project, "stage1.partial", CURVE)

    def gone(folder: Path, pattern: str) -> Iterator[Path]:
        raise FileNotFoundError(folder / pattern)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", gone)
        curves.look()
    assert not curves.points
    curves.look()
    assert len(curves.points) == 3


def test_a_curve_of_a_killed_run_waits_until_it_is_written_again_and_each_point_is_read_once(project: Project) -> None:
    curves = Curves(project.artifacts)
    write_curve(project, "stage1.partial", "step,reward\n0,9.0\n")
    file = project.artifacts / "stage1.partial" / "stage1.csv"
    os.utime(file, ns=(5, 5))
    curves.begin("stage1", 5)
    curves.look()
    assert curves.points == []
    write_curve(project, "stage1.partial", "step,reward\n0,0.5\n")
    curves.look()
    curves.look()
    (project.artifacts / "stage1.partial").rename(project.artifacts / "stage1")
    write_curve(project, "stage1", "step,reward\n0,0.5\n1,0.75\n")
    curves.done("stage1")
    curves.begin("stage2", 0)
    write_curve(project, "stage2.partial", "step,reward\n0,0.5\n1,0.75\n")  # stage II keeps stage I's curve
    curves.look()
    assert {step for step, _ in curves.points} == {"stage1"}
    points = [point for _, point in curves.points]
    assert [point[:3] for point in points] == [("stage1/reward", 0.5, 0), ("stage1/reward", 0.75, 1)]
    times = [point[3] for point in points]
    assert times == sorted(times)


def test_each_stage_has_a_run_below_with_its_parameters_curve_times_machine_and_end(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_child, "SECONDS", 0.01)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    for variable, value in {"KFP_RUN_ID": "k1", "VISMEM_IMAGE": "vismem@sha256:1", "DVC_EXP_NAME": "wild-cat"}.items():
        monkeypatch.setenv(variable, value)
    with child(project) as told:
        told.tell("begin stage1 0")
        write_curve(project, "stage1.partial", CURVE)
        os.utime(project.artifacts / "stage1.partial" / "stage1.csv", ns=(10**18, 10**18))
        wait_for_metric(project, "stage1/reward", 0.5)
        wait_for(lambda: any("system/cpu_utilization_percentage" in run.data.metrics for run in all_runs(project)))
        (project.artifacts / "stage1.partial").rename(project.artifacts / "stage1")
        told.tell("done stage1", "begin stage2 0", "end FAILED")
    (parent,) = runs(project)
    tags = parent.data.tags
    assert (tags["kfp_run_id"], tags["image"], tags["dvc_experiment"]) == ("k1", "vismem@sha256:1", "wild-cat")
    stages = {run.info.run_name: run for run in runs(project, parent.info.run_id)}
    assert {name: run.info.status for name, run in stages.items()} == {"stage1": "FINISHED", "stage2": "FAILED"}
    first, second = stages["stage1"], stages["stage2"]
    assert parent.info.start_time <= first.info.end_time <= second.info.start_time <= second.info.end_time
    assert first.data.params["stage1.steps"] == str(project.config.stage1.steps)
    assert not any(name.startswith("stage2") for name in first.data.params)
    client = project.store.client
    for run in (parent, first):
        points = client.get_metric_history(run.info.run_id, "stage1/reward")
        assert [(point.step, point.value, point.timestamp) for point in points] == [(0, 0.25, 10**12), (1, 0.5, 10**12)]


def all_runs(project: Project) -> list[Any]:
    return list(project.store.client.search_runs([experiment_id(project.store)]))


def wait_for(reached: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(500):
        if reached():
            return
        waited.wait(0.02)
    raise AssertionError("never reached")


def test_what_happened_while_the_store_was_away_is_told_with_its_own_times(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, uri = Run(project.config, project.artifacts), project.config.registry.tracking_uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run.begin("stage1", 0)
    write_curve(project, "stage1.partial", CURVE)
    assert not run.update()
    run.end("FINISHED")
    run.begin("stage2", 0)
    write_curve(project, "stage2.partial", CURVE, "stage2")
    began = [stage.began for stage in run.stages]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert run.update()
    run.close("KILLED")
    (parent,) = runs(project)
    stages = sorted(runs(project, parent.info.run_id), key=lambda one: one.info.run_name)
    assert [one.info.status for one in stages] == ["FINISHED", "KILLED"]
    assert [one.info.start_time for one in stages] == began
    own = [sorted(name for name in one.data.metrics if not name.startswith("system/")) for one in stages]
    assert own == [["stage1/kl", "stage1/reward"], ["stage2/kl", "stage2/reward"]]
