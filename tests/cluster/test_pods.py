"""Each pod of a run: valid, with its image, variables, secrets, volumes, resources and nodes, and tried again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kfp_argo as argo
import kubernetes_validate
import pytest
from committed import COMMITTED, REGISTRY_IMAGE, SHARED
from kfp_model import Kubeflow, Pod
from kubernetes_validate.utils import all_versions

from pipelines.pipeline import IMAGE, STAYS
from vismem.errors import UserError
from vismem.kubeflow.cluster import load_cluster
from vismem.steps import STEPS

VERSIONS = ("1.30.0", all_versions()[-1])  # as in tests/unit/test_manifests.py
TASKS = {step.name for step in STEPS} | {"configure", "preflight", "summary"}
TRAINS = {"base", "stage1", "stage2", "evaluate", "export", "deploy", "preflight"}
EVALUATES = {"base", "evaluate", "export", "deploy"}
S3, MLFLOW, HUB = "vismem-s3", "vismem-mlflow", "vismem-huggingface"
SECRETS = {  # by task
    "configure": {S3},
    "prepare": {S3},
    "preflight": {S3, MLFLOW, HUB},
    "validate": {HUB},
    "base": {HUB},
    "register": {S3, MLFLOW},
    "promote": {S3, MLFLOW},
    "deploy": {HUB},
}
EVERYTHING: dict[str, Any] = {
    "gpu_count": 2,
    "evaluation_gpu_count": 1,
    "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}],
    "node_selector": {"zone": "b"},
    "queue": "gpus",
    "training_backend": "trainer",
    "num_processes": 8,
    "num_nodes": 2,
    "training_cpu": "96",
    "training_memory": "900Gi",
    "evaluation_cpu": "1500m",
    "evaluation_memory": "90Gi",
    "image_pull_policy": "Always",
}
HOUR = 3600
SPLITS = ("train", "validation", "test")


def limits(pod: Pod) -> dict[str, str]:
    found: dict[str, str] = pod.main["resources"]["limits"]
    return found


def test_every_pod_keeps_to_the_schemas_of_kubernetes(kubeflow: Kubeflow, compiled: Callable[..., str]) -> None:
    for version, pipeline in zip(VERSIONS, (compiled(shared_volume=True, **EVERYTHING), COMMITTED), strict=True):
        kubeflow.cache.clear()
        pods = kubeflow.run(pipeline, {"image": REGISTRY_IMAGE})
        assert set(pods) == TASKS
        listed = {"apiVersion": "v1", "kind": "PodList", "items": [pod.manifest for pod in pods.values()]}
        kubernetes_validate.validate(listed, version, strict=True)
        for pod in pods.values():
            mounted = {mount["name"] for mount in pod.main["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod.manifest["spec"]["volumes"]}
            assert [word for word in pod.main["args"] if "{{" in word] == ["{{$}}"]  # that is the launcher's
    listed["items"][3]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        kubernetes_validate.validate(listed, version, strict=True)


def test_a_run_names_image_pull_policy_and_pull_secret_of_every_pod(
    kubeflow: Kubeflow, compiled: Callable[..., str]
) -> None:
    given = {"image": REGISTRY_IMAGE, "image_pull_secret": "mine"}
    for policy, pipeline in (("IfNotPresent", COMMITTED), ("Always", compiled(shared_volume=True, **EVERYTHING))):
        for pod in kubeflow.run(pipeline, given).values():
            assert (pod.main["image"], pod.main["imagePullPolicy"]) == (REGISTRY_IMAGE, policy)
            assert pod.manifest["spec"]["imagePullSecrets"] == [{"name": "mine"}]
        kubeflow.cache.clear()


def test_the_default_image_names_a_version_and_one_that_moves_ends_the_run_in_its_first_task(
    kubeflow: Kubeflow,
) -> None:
    assert {pod.main["image"] for pod in kubeflow.run(COMMITTED).values()} == {IMAGE}
    with pytest.raises(UserError, match="has a tag that moves"):
        kubeflow.run(COMMITTED, {"image": "registry.example.com/vismem-train:latest"})
    assert set(kubeflow.pods) == {"configure"}


def test_a_run_on_data_that_no_pod_has_ends_in_its_first_task(
    kubeflow: Kubeflow, compiled: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    large = compiled(gpu_count=8, evaluation_gpu_count=1)
    with pytest.raises(UserError, match=r"names data/train.jsonl, which no task of a cluster has: .* kind `dvc`"):
        kubeflow.run(large, {"profile": "qwen2_5_vl_7b"})
    assert set(kubeflow.pods) == {"configure"}
    for split in SPLITS:  # as on a shared volume
        (tmp_path / f"{split}.jsonl").touch()
    there = {f"prepare.sources.{at}.path": str(tmp_path / f"{split}.jsonl") for at, split in enumerate(SPLITS)}
    assert "deploy" in kubeflow.run(large, {"profile": "qwen2_5_vl_7b", "overrides": there})


def test_a_pod_gets_the_secrets_that_its_task_uses_by_the_names_that_the_run_gives(kubeflow: Kubeflow) -> None:
    pods = kubeflow.run(COMMITTED, {"s3_secret": "mine"})
    for task, pod in pods.items():
        named = {value[0] for value in pod.env.values() if isinstance(value, tuple)}
        assert named == {"mine" if secret == S3 else secret for secret in SECRETS.get(task, set())}, task
    keys = {(task, place) for task, pod in pods.items() for place, volume in pod.volumes.items() if "secret" in volume}
    assert keys == {("register", "/etc/vismem/signing")}


def test_no_pod_has_a_variable_by_which_kubeflow_s_launcher_would_find_another_store(kubeflow: Kubeflow) -> None:
    """It runs in the task's container, and asks AWS's SDK, which reads these."""
    pods = kubeflow.run(COMMITTED)
    for task, pod in pods.items():
        assert [name for name in pod.env if name.startswith(("AWS_", "GOOGLE_"))] == [], task
    assert pods["register"].env["VISMEM_AWS_ENDPOINT_URL_S3"] == ("vismem-s3", "AWS_ENDPOINT_URL_S3")


def test_the_version_s_task_learns_which_run_and_which_image_made_it(kubeflow: Kubeflow) -> None:
    pods = kubeflow.run(COMMITTED, {"image": "host/train@sha256:1"})
    assert pods["register"].inputs["image"] == pods["register"].main["image"] == "host/train@sha256:1"
    assert pods["register"].inputs["run"] == kubeflow.name


def test_pods_that_train_or_decode_have_their_size_nodes_shared_memory_and_queue_and_are_not_evicted_to_save_nodes(
    kubeflow: Kubeflow, compiled: Callable[..., str]
) -> None:
    settings = {**EVERYTHING, "training_backend": "torchrun", "num_nodes": 1}
    pods = kubeflow.run(compiled(**settings))
    for task in TRAINS:
        spec, metadata = pods[task].manifest["spec"], pods[task].manifest["metadata"]
        assert limits(pods[task])["memory"] == pods[task].main["resources"]["requests"]["memory"]
        assert limits(pods[task])["memory"] == ("90Gi" if task in EVALUATES else "900Gi")
        placed = task not in {"export", "deploy"}  # those have no GPU, where others have
        assert [toleration["key"] for toleration in spec["tolerations"]] == ["nvidia.com/gpu", "spot"] * placed
        assert spec["nodeSelector"] == ({"zone": "b"} if placed else {})
        assert {"name": "shared-memory", "emptyDir": {"medium": "Memory"}} in spec["volumes"]
        assert metadata["annotations"].items() >= STAYS.items()
        assert metadata["labels"] == ({"kueue.x-k8s.io/queue-name": "gpus"} if placed else {})
    gpus = {task: limits(pods[task]).get("nvidia.com/gpu") for task in TRAINS}
    assert gpus == {
        "preflight": "2", "stage1": "2", "stage2": "2", "base": "1", "evaluate": "1", "export": None, "deploy": None,
    }  # fmt: skip
    others = [pods[task] for task in TASKS - TRAINS]
    assert [pod for pod in others if pod.manifest["spec"]["tolerations"] or limits(pod)["memory"] != "8Gi"] == []


def test_without_gpus_all_that_decodes_keeps_to_the_nodes_that_are_for_it(
    kubeflow: Kubeflow, compiled: Callable[..., str]
) -> None:
    pods = kubeflow.run(compiled(node_selector={"zone": "b"}, queue="cpus"))
    assert {task for task, pod in pods.items() if pod.manifest["spec"]["nodeSelector"]} == TRAINS
    assert {task for task, pod in pods.items() if pod.manifest["metadata"]["labels"]} == TRAINS


def test_a_pod_has_a_thread_for_each_of_its_cpus_unless_it_starts_several_processes(
    kubeflow: Kubeflow, compiled: Callable[..., str]
) -> None:
    threads = {task: pod.env.get("OMP_NUM_THREADS") for task, pod in kubeflow.run(COMMITTED).items()}
    assert threads == {task: "4" if task in TRAINS else "2" for task in TASKS}
    settings = {**EVERYTHING, "training_backend": "torchrun", "num_nodes": 1}
    kubeflow.cache.clear()
    pods = kubeflow.run(compiled(**settings))
    found = {task: pods[task].env.get("OMP_NUM_THREADS") for task in TRAINS}
    assert found == {
        "preflight": "96", "stage1": None, "stage2": None, "base": "1", "evaluate": "1", "export": "1", "deploy": "1",
    }  # fmt: skip


def test_a_task_that_only_waits_for_kubeflow_trainer_asks_for_no_node_of_its_own(
    kubeflow: Kubeflow, compiled: Callable[..., str]
) -> None:
    pods = kubeflow.run(compiled(shared_volume=True, **EVERYTHING))
    settings = load_cluster()
    for task in ("stage1", "stage2"):
        assert limits(pods[task]) == {"cpu": settings.task_cpu, "memory": settings.task_memory}
        assert pods[task].manifest["spec"]["nodeSelector"] == {}
        assert pods[task].manifest["metadata"]["labels"] == {}
        assert pods[task].manifest["metadata"]["annotations"].items() >= STAYS.items(), "its end ends the job"
        assert pods[task].manifest["spec"]["activeDeadlineSeconds"] > settings.training_hours * HOUR
    assert pods["preflight"].inputs["parameters"]["preflight"]["gpus"] == 0


def test_with_the_shared_volume_every_pod_sees_it_and_keeps_checkpoints_there(kubeflow: Kubeflow) -> None:
    for pod in kubeflow.run(SHARED).values():
        assert {"name": "vismem-shared", "mountPath": "/shared"} in pod.main["volumeMounts"]
        claim = {"persistentVolumeClaim": {"claimName": "vismem-shared"}}
        assert {"name": "vismem-shared", **claim} in pod.manifest["spec"]["volumes"]
        assert (pod.env["VISMEM_WORK"], pod.env["HF_HOME"]) == ("/shared/work", "/shared/huggingface")


@pytest.mark.parametrize("task", ["stage1", "stage2", "evaluate"])
def test_a_training_pod_that_is_evicted_after_two_days_is_tried_again(kubeflow: Kubeflow, task: str) -> None:
    pod = kubeflow.run(SHARED)[task]
    assert argo.tried_again(pod.tries, "Failed", tries=1, elapsed=50 * HOUR)
    assert argo.tried_again(pod.tries, "Failed", tries=2, elapsed=140 * HOUR)
    assert not argo.tried_again(pod.tries, "Failed", tries=3, elapsed=140 * HOUR)


def test_every_pod_ends_in_time_and_those_that_cost_no_training_are_tried_again_also_at_the_end_of_that_time(
    kubeflow: Kubeflow,
) -> None:
    pods = kubeflow.run(COMMITTED)
    once = {task for task, pod in pods.items() if not pod.tries}
    assert once == {"configure", "preflight", "summary", "stage1", "stage2", "evaluate"}
    for task, pod in pods.items():
        longest = pod.manifest["spec"]["activeDeadlineSeconds"]
        assert longest == (72 if task in TRAINS else 6) * HOUR
        assert task in once or argo.tried_again(pod.tries, "Failed", tries=1, elapsed=longest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training_memry": "1Gi"}, r"unknown key 'training_memry' \(did you mean 'training_memory'\?\)"),
        ({"gpu_count": "many"}, "'gpu_count': Input should be a valid integer"),
        ({"num_processes": 2}, "one process"),
        ({"num_nodes": 2, "training_backend": "torchrun"}, "2 nodes need backend 'trainer'"),
    ],
)
def test_a_mistake_in_the_settings_is_named(
    compiled: Callable[..., str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compiled(**settings)
