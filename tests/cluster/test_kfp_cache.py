"""What a task is found again by in Kubeflow's cache: what changes its output, and nothing else but the image."""

from collections.abc import Callable
from typing import Any

import pytest
from committed import COMMITTED, REGISTRY_IMAGE
from kfp_model import Kubeflow

from vismem.kubeflow import parameters

CACHED = ["prepare", "validate", "base", "stage1", "stage2", "evaluate", "export"]
ALWAYS = {"configure", "preflight", "register", "promote", "deploy", "summary"}


def ran(kubeflow: Kubeflow, pipeline: str = COMMITTED, **arguments: Any) -> set[str]:
    """The tasks of a run that were not taken from the cache, without those that never are."""
    return set(kubeflow.run(pipeline, arguments)) - ALWAYS


def keys(kubeflow: Kubeflow, pipeline: str = COMMITTED, **arguments: Any) -> dict[str, str | None]:
    """The key of each task in a cluster that has run nothing."""
    kubeflow.cache.clear()
    pods = kubeflow.run(pipeline, arguments)
    assert {task for task, pod in pods.items() if pod.key is None} == ALWAYS
    return {task: pods[task].key for task in CACHED}


@pytest.mark.parametrize(
    "settings",
    [
        {
            **{"training_memory": "64Gi", "training_cpu": "8", "task_memory": "9Gi", "training_hours": 9},
            **{"gpu_count": 4, "evaluation_gpu_count": 1, "gpu_type": "amd.com/gpu", "image_pull_policy": "Always"},
            **{"tolerations": [{"key": "spot"}], "node_selector": {"zone": "b"}, "queue": "gpus"},
        },
        {"training_backend": "torchrun", "num_processes": 4},
        {"training_backend": "trainer", "num_processes": 4, "num_nodes": 2, "training_memory": "64Gi"},
    ],
    ids=["pods", "torchrun", "trainer"],
)
def test_what_pods_ask_of_the_cluster_trains_nothing_again(
    kubeflow: Kubeflow, compiled: Callable[..., str], settings: dict[str, Any]
) -> None:
    assert ran(kubeflow) == set(CACHED)
    assert ran(kubeflow, compiled(**settings)) == set()


@pytest.mark.parametrize("given", [{"s3_secret": "mine"}, {"mlflow_secret": "mine"}, {"image_pull_secret": "mine"}])
def test_names_of_secrets_train_nothing_again(kubeflow: Kubeflow, given: dict[str, str]) -> None:
    assert ran(kubeflow) == set(CACHED)
    assert ran(kubeflow, **given) == set()


def test_another_image_runs_everything_again_since_kubeflow_has_it_in_every_key(kubeflow: Kubeflow) -> None:
    before = keys(kubeflow)
    after = keys(kubeflow, image=REGISTRY_IMAGE)
    assert [task for task in CACHED if before[task] == after[task]] == []


@pytest.mark.parametrize(
    ("overrides", "again"),
    [
        ({"seed": 5}, [task for task in CACHED if task != "base"]),
        ({"validate.min_pixels": 5}, [task for task in CACHED if task not in ("prepare", "base")]),
        ({"stage1.steps": 5}, ["stage1", "stage2", "evaluate", "export"]),
        ({"stage2.steps": 5}, ["stage2", "evaluate", "export"]),
        ({"evaluate.bootstrap": 200}, ["evaluate", "export"]),
        ({"gate.min_gain": 5, "preflight.free_disk_gb": 1}, []),
    ],
    ids=str,
)
def test_parameters_run_their_step_again_and_those_that_read_its_output(
    kubeflow: Kubeflow, overrides: dict[str, Any], again: list[str]
) -> None:
    ran(kubeflow)
    assert ran(kubeflow, overrides=overrides) == set(again)


@pytest.mark.parametrize(("step", "again"), [("prepare", CACHED[:2] + CACHED[3:]), ("stage2", CACHED[4:])])
def test_changed_code_runs_its_step_again_and_those_that_read_its_output(
    kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch, step: str, again: list[str]
) -> None:
    ran(kubeflow)
    known = parameters.code_fingerprint
    monkeypatch.setattr(parameters, "code_fingerprint", lambda name: "changed" if name == step else known(name))
    assert ran(kubeflow) == set(again)


def test_changed_data_run_again_what_reads_them(kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(kubeflow)
    monkeypatch.setattr(parameters, "sources_fingerprint", lambda config: "changed")
    assert ran(kubeflow) == set(CACHED) - {"base"}
