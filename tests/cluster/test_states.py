"""What a run is called at its end: what Kubeflow hands to the exit task, and what that makes of it."""

from pathlib import Path

import pytest
from committed import COMMITTED, SHARED
from kfp_model import Kubeflow, Pod

from vismem.kubeflow.results import write_summary


def summary(pods: dict[str, Pod], page: Path) -> tuple[str, str]:
    """The state that Kubeflow hands over, and the first line of our page."""
    status = pods["summary"].inputs["status"]
    assert status["pipelineTaskName"] == "exit-handler-1"
    return status["state"], write_summary(str(page), status["state"]).splitlines()[0]


@pytest.mark.parametrize("verdict", ["promoted", "refused"])
@pytest.mark.parametrize("ends", [{}, {"prepare": ["FAILED"]}, {"register": ["LOST", "FAILED"]}])
def test_a_run_is_called_good_whatever_the_gate_says_and_also_where_a_task_took_several_tries(
    kubeflow: Kubeflow, tmp_path: Path, verdict: str, ends: dict[str, list[str]]
) -> None:
    kubeflow.verdict = verdict
    pods = kubeflow.run(COMMITTED, ends=ends)
    assert ("deploy" in pods, "keep" in pods) == (verdict == "promoted", verdict == "refused")
    assert summary(pods, tmp_path / "page") == ("COMPLETE", "# The run succeeded")


def test_a_run_that_takes_all_it_can_from_the_cache_is_called_good(kubeflow: Kubeflow, tmp_path: Path) -> None:
    kubeflow.run(COMMITTED)
    again = kubeflow.run(COMMITTED)
    assert set(again) == {"configure", "preflight", "register", "promote", "deploy", "summary"}
    assert summary(again, tmp_path / "page") == ("COMPLETE", "# The run succeeded")


@pytest.mark.parametrize("task", ["configure", "stage1", "promote", "deploy"])
def test_a_run_of_which_a_task_fails_is_called_failed(kubeflow: Kubeflow, tmp_path: Path, task: str) -> None:
    pods = kubeflow.run(COMMITTED, ends={task: ["FAILED"] * 3})
    assert summary(pods, tmp_path / "page") == ("FAILED", "# The run failed")
    assert next(reversed(pods)) == "summary"


@pytest.mark.parametrize("task", ["stage1", "register"])
def test_a_run_of_which_a_pod_is_lost_is_not_called_good_though_kubeflow_says_it_is_running(
    kubeflow: Kubeflow, tmp_path: Path, task: str
) -> None:
    pods = kubeflow.run(COMMITTED, ends={task: ["LOST"] * 3})
    assert summary(pods, tmp_path / "page") == ("RUNNING", "# The run did not complete")


def test_a_training_pod_that_is_lost_resumes_where_checkpoints_are_kept(kubeflow: Kubeflow, tmp_path: Path) -> None:
    pods = kubeflow.run(SHARED, ends={"stage1": ["LOST"]})
    assert summary(pods, tmp_path / "page") == ("COMPLETE", "# The run succeeded")
