"""Kubeflow Trainer's adapter: what it asks of a cluster, and what it makes of the answers."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import mock_open

import pytest
from kubeflow_trainer_api import models
from manifests import values
from trainer_api import NAMESPACE, Cluster, cluster

from vismem.config import Config
from vismem.errors import UserError
from vismem.launch import LaunchConfig
from vismem.launch import trainer as adapter

GPU = "nvidia.com/gpu"
LAUNCH = LaunchConfig(
    "trainer",
    num_processes=8,
    num_nodes=2,
    image="registry.example.com/vismem-train@sha256:0",
    resources={GPU: 8, "cpu": 16, "memory": "256Gi"},
    node_selector={"gpu": "h100"},
    tolerations=({"key": "spot", "operator": "Exists", "effect": "NoSchedule"},),
    hours=2,
)
COMMAND = ["python", "-m", "torch.distributed.run", "-m", "vismem.cli", "stage1"]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(adapter, "POLL", 0.05)
    with cluster(tmp_path) as (found, kubeconfig):
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
        yield found


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have each node run a line of Python in place of the worker."""

    command = adapter.options.TrainerCommand

    def of(program: str) -> None:
        monkeypatch.setattr(adapter.options, "TrainerCommand", lambda _: command([sys.executable, "-c", program]))

    return of


def submit(name: str, launch: LaunchConfig = LAUNCH) -> None:
    client = adapter.sdk.TrainerClient(adapter.sdk.KubernetesBackendConfig(namespace=NAMESPACE))
    adapter.submit_job(client, name, COMMAND, launch)


@pytest.fixture
def posted(stand_in: Cluster, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The TrainJobs by name, as they are posted: nothing runs them."""
    monkeypatch.setattr(stand_in, "create", lambda body: stand_in.jobs.setdefault(body["metadata"]["name"], body))
    return stand_in.jobs


@pytest.fixture
def job(posted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    submit("vismem-stage1-0")
    return posted["vismem-stage1-0"]


def test_a_job_is_one_that_the_api_knows_to_the_last_field(job: dict[str, Any]) -> None:
    """Its models drop unknown fields, so what comes back differs where there is one."""
    read = models.TrainerV1alpha1TrainJob.from_dict(job)
    assert read is not None
    assert read.to_dict() == job


def test_a_job_says_image_command_nodes_gpus_and_time(job: dict[str, Any]) -> None:
    spec, trainer = job["spec"], job["spec"]["trainer"]
    assert trainer["image"] == LAUNCH.image
    assert trainer["numNodes"] == 2
    assert trainer["command"] == COMMAND
    wanted = {GPU: "8", "cpu": "16", "memory": "256Gi"}
    assert trainer["resourcesPerNode"] == {"limits": wanted, "requests": wanted}
    assert spec["activeDeadlineSeconds"] == 7200
    assert spec["runtimeRef"] == {"kind": "TrainingRuntime", "name": "vismem-torch"}


def test_a_job_s_nodes_see_the_shared_volume_and_run_where_they_may(job: dict[str, Any], stand_in: Cluster) -> None:
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "vismem-shared"}}]
    (container,) = pod["containers"]
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
    assert pod["nodeSelector"] == {"gpu": "h100"}
    (before,) = values(stand_in.runtime, "tolerations")
    assert pod["tolerations"] == [*before, *LAUNCH.tolerations], "the list takes the place of the runtime's"
    (there,) = stand_in.runtime["spec"]["template"]["spec"]["replicatedJobs"]
    named = [found["name"] for found in there["template"]["spec"]["template"]["spec"]["containers"]]
    assert (replicated["name"], [container["name"]]) == (there["name"], named), "of another name, it would be refused"


def test_a_job_may_wait_in_a_queue_of_kueue(posted: dict[str, dict[str, Any]]) -> None:
    submit("queued", replace(LAUNCH, queue="gpus"))
    assert posted["queued"]["metadata"]["labels"][adapter.QUEUE] == "gpus"


def test_a_job_lies_in_the_namespace_of_its_launcher(stand_in: Cluster, runs: Any, tmp_path: Path) -> None:
    """A pod's own; here the one that the kubeconfig names."""
    runs("pass")
    assert adapter.run_job("job", COMMAND, LAUNCH, tmp_path / "stage1")[0] is True
    places = {path.split("/namespaces/")[1].split("/")[0] for path in stand_in.requests if "/namespaces/" in path}
    assert places - {"kubeflow-system"} == {NAMESPACE}  # where the SDK looks for Trainer itself


def test_a_pod_s_own_namespace_is_what_kubernetes_wrote_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubeflow.common.utils.is_running_in_k8s", lambda: True)
    monkeypatch.setattr("builtins.open", mock_open(read_data="of-a-profile"))
    assert adapter.get_default_target_namespace() == "of-a-profile"


def test_a_job_waits_in_the_queue_that_the_runtime_names(stand_in: Cluster, posted: dict[str, dict[str, Any]]) -> None:
    submit("without")
    stand_in.runtime["metadata"]["labels"][adapter.QUEUE] = "gpus"
    submit("with")
    assert adapter.QUEUE not in posted["without"]["metadata"]["labels"]
    assert posted["with"]["metadata"]["labels"][adapter.QUEUE] == "gpus"


def test_a_patch_sets_no_environment_of_a_node(job: dict[str, Any]) -> None:
    """Trainer's webhook refuses one that does; what nodes need of it stands in the runtime."""
    assert "'env'" not in repr(job)


def test_a_job_that_completes_has_its_log_shown_once_and_is_deleted(
    stand_in: Cluster, runs: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs("import time; print('step 1', flush=True); time.sleep(0.3); print('step 2')")
    assert adapter.run_job("job", COMMAND, LAUNCH, tmp_path / "stage1") == (True, ["step 1", "step 2"])
    shown = capfd.readouterr().err
    assert [shown.count(line) for line in ("step 1", "step 2")] == [1, 1]
    assert stand_in.pods == {}


def test_a_job_of_which_one_node_fails_has_failed_and_is_deleted(stand_in: Cluster, runs: Any, tmp_path: Path) -> None:
    runs("import os, time; print('here'); os.environ['PET_NODE_RANK'] == '1' and os._exit(3); time.sleep(60)")
    assert adapter.run_job("job", COMMAND, LAUNCH, tmp_path / "stage1")[0] is False
    assert stand_in.pods == {}


@pytest.mark.parametrize(
    ("program", "ended", "made", "shown"),
    [
        ("import time; time.sleep(0.5); print('left')", False, False, "left"),
        ("raise SystemExit(1)", True, False, "new"),
        ("print('left')", True, True, "left"),
        ("print('left')", True, False, "new"),
    ],
    ids=["running", "failed", "complete", "complete, and its output taken since"],
)
def test_a_job_that_a_killed_launcher_left_is_joined_unless_it_failed_or_is_of_an_earlier_training(
    program: str, ended: bool, made: bool, shown: str, stand_in: Cluster, runs: Any, tmp_path: Path
) -> None:
    runs(program)
    submit("job")
    if ended:
        for pod in stand_in.pods["job"]:
            pod.wait()
        runs("print('new')")
    if made:
        (tmp_path / "stage1").mkdir()
    (tmp_path / adapter.LOGS).mkdir()
    before = len(stand_in.requests)
    assert adapter.run_job("job", COMMAND, LAUNCH, tmp_path / "stage1") == (True, [shown])
    assert (tmp_path / adapter.LOGS).is_dir() == (shown != "new"), "a job that is joined writes there"
    posts = [line for line in stand_in.requests[before:] if line.startswith("POST")]
    assert len(posts) == (shown == "new")
    assert stand_in.pods == {}


def test_a_launcher_that_is_told_to_end_deletes_its_job(
    stand_in: Cluster, runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs("import time; time.sleep(60)")

    def told(client: object, name: str) -> None:
        assert name in stand_in.pods
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(adapter, "_follow", told)
    with pytest.raises(SystemExit):
        adapter.run_job("job", COMMAND, LAUNCH, tmp_path / "stage1")
    assert stand_in.pods == {}


def test_a_cluster_without_the_runtime_is_named(stand_in: Cluster, tmp_path: Path) -> None:
    stand_in.runtime["metadata"]["name"] = "another"
    with pytest.raises(UserError, match=r"namespace mine: Failed to get Runtime: vismem-torch .*\(Not Found\)"):
        adapter.run_job("job", COMMAND, LAUNCH, tmp_path / "stage1")


def test_whole_amounts_stay_whole_though_they_came_as_json(posted: dict[str, dict[str, Any]]) -> None:
    submit("job", LaunchConfig("trainer", image="i", resources={GPU: 8.0, "cpu": "16", "memory": "1Gi"}))
    asked = posted["job"]["spec"]["trainer"]["resourcesPerNode"]
    assert asked["limits"] == asked["requests"] == {GPU: "8", "cpu": "16", "memory": "1Gi"}


@pytest.mark.parametrize("status", [0, 3])
def test_the_local_back_end_runs_its_processes_here_and_tells_success_from_failure(
    status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapter, "_run_cli", _exit_as_told)
    monkeypatch.setattr(adapter, "step_arguments", lambda *_: [str(status)])
    launch = LaunchConfig("trainer", num_processes=2)
    if status:
        with pytest.raises(UserError, match=r"exitcode +: 3"):
            adapter.run_locally(launch, "stage1", Config(), tmp_path, {})
        return
    assert adapter.run_locally(launch, "stage1", Config(), tmp_path, {}) == "stage1: done"
    assert {"rank 0 of 2", "rank 1 of 2"} <= set(capfd.readouterr().out.splitlines())


def _exit_as_told(parameters: dict[str, list[str]]) -> None:
    import os

    os.write(1, f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\n".encode())
    os._exit(int(parameters["arguments"][0]))


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        ({"backend": "ray"}, "backend 'ray' is not known"),
        ({"num_processes": 2}, "backend 'process' is one process"),
        ({"backend": "torchrun", "num_nodes": 2}, "2 nodes need backend 'trainer' and an image"),
        (
            {"backend": "trainer", "num_processes": 0},
            "1 nodes with 0 processes each were asked for: both numbers must be at least 1",
        ),
        ({"backend": "trainer", "resources": {"memory": "1Gi"}}, "do not say how many 'cpu'"),
    ],
)
def test_what_cannot_be_launched_is_refused_with_the_reason(launch: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        LaunchConfig(**launch)
