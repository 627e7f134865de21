"""A run of MLflow that was opened for us, as Kubeflow Pipelines' MLflow plugin does for every task (MLFLOW_RUN_ID)."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from project import Project

from vismem.kubeflow import task
from vismem.records import Metrics
from vismem.registry import GIVEN_RUN
from vismem.registry.tracking import find_version
from vismem.registry.verdict import read_registered


@pytest.mark.parametrize("fails", [False, True])
def test_a_task_shows_itself_in_the_run_that_kubeflow_opened_for_it_and_leaves_the_end_to_kubeflow(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    client = project.store.client
    theirs = client.create_experiment("KFP-Default", artifact_location=(tmp_path / "kfp").as_uri())
    given = client.create_run(theirs, run_name="stage1 by Kubeflow").info.run_id
    monkeypatch.setenv(GIVEN_RUN, given)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", project.config.registry.tracking_uri)

    def launch(name: str, config: Any, artifacts: Path, *_: Any) -> str:
        partial = artifacts / "stage1.partial"
        partial.mkdir()
        (partial / "stage1.csv").write_text("step,reward\n0,0.25\n1,0.5\n")
        if fails:
            raise OSError("no memory")
        partial.rename(artifacts / "stage1")
        return "done"

    monkeypatch.setattr(task, "launch_step", launch)
    monkeypatch.setattr(task, "describe", lambda *_: ({}, {}))
    out = SimpleNamespace(path=str(project.artifacts / "stage1"), metadata={})
    values = project.config.model_dump(mode="json", by_alias=True)
    with pytest.raises(OSError, match="no memory") if fails else nullcontext():
        task.run_task({**values, task.IDENTITY: {"code": "c"}}, out)
    run = client.get_run(given)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "stage1 by Kubeflow")
    assert run.data.metrics["stage1/reward"] == 0.5
    assert run.data.params["stage1.steps"] == str(project.config.stage1.steps)
    assert len(client.search_runs([theirs])) == 1
    assert client.get_experiment_by_name("vismem") is None


def test_register_goes_on_with_a_run_that_kubeflow_opened_in_whatever_experiment(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = project.store.client
    theirs = client.create_experiment("KFP-Default", artifact_location=(tmp_path / "kfp").as_uri())
    given = client.create_run(theirs, run_name="register by Kubeflow").info.run_id
    monkeypatch.setenv(GIVEN_RUN, given)
    monkeypatch.setenv("KFP_RUN_ID", "k1")
    project.build(b"one")
    made = project.run("register")
    run = client.get_run(given)
    assert (made["run_id"], made["passed"], run.info.status) == (given, True, "RUNNING")
    assert run.info.run_name == "register by Kubeflow"
    assert client.get_logged_model(made["model_id"]).experiment_id == theirs
    assert client.get_model_version("vismem", "1").tags["kfp_run_id"] == "k1"
    project.build(b"two", score=67.0)
    second = project.run("register")
    assert second["run_id"] != given, "a run is of one version: its figures stay as they were registered"
    assert client.get_run(second["run_id"]).info.status == "FINISHED"
    assert client.get_run(given).info.status == "RUNNING"
    first = find_version(project.store, "1")
    assert first
    assert read_registered(project.store, first, Metrics).arms["vismem"]["overall"] == 66.0
    client.set_terminated(given)
    project.build(b"three")
    assert project.run("register")["run_id"] != given
