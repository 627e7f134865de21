"""The manifests of each overlay of deploy/kubernetes: valid, and their references to each other complete."""

import re
from copy import deepcopy

import kubernetes_validate
import pytest
import yaml
from kubeflow.trainer.backends.kubernetes.utils import get_runtime_trainer
from kubeflow_trainer_api import models
from kubernetes_validate.utils import all_versions
from manifests import (
    KUBERNETES,
    OPTIONAL_SECRETS,
    OVERLAYS,
    SECRETS,
    Manifest,
    containers,
    labels_of_pods,
    named,
    of_kind,
    overlays,
    pod_templates,
    render,
    selects,
    values,
)

from vismem.launch import LaunchConfig

OLDEST, NEWEST = "1.30.0", all_versions()[-1]  # the oldest that knows `preStop.sleep`
TRAINER = "trainer.kubeflow.org/v1alpha1"
OUTSIDE_PODS = ("workflows.argoproj.io/workflow",)  # labels of pods that others make in the namespace: steps of a run
CLUSTER_WIDE = {"Namespace"}

# --- each manifest by itself ---


@overlays
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_core_manifests_keep_to_the_schemas_of_kubernetes(overlay: str, version: str) -> None:
    core = [manifest for manifest in render(overlay) if manifest["apiVersion"] != TRAINER]
    assert len(core) > 15
    for manifest in core:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_manifest_with_a_field_that_does_not_exist_is_refused() -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"port": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="port"):
        kubernetes_validate.validate(service, NEWEST, strict=True)


def test_only_training_on_several_nodes_needs_kubeflow_trainer() -> None:
    kinds = {overlay: [m["kind"] for m in render(overlay) if m["apiVersion"] == TRAINER] for overlay in OVERLAYS}
    assert kinds == {"multi-node": ["TrainingRuntime"], "single-gpu": []}


def test_the_runtime_keeps_to_the_api_of_kubeflow_trainer() -> None:
    (runtime,) = of_kind("multi-node", "TrainingRuntime")
    assert read_by_trainer(runtime) == runtime
    misspelt = deepcopy(runtime)
    misspelt["spec"]["mlPolicy"]["numNode"] = 2
    assert read_by_trainer(misspelt) != misspelt


def read_by_trainer(runtime: Manifest) -> Manifest:
    """The manifest as the models of the API hold it: they drop the fields that they do not know."""
    read = models.TrainerV1alpha1TrainingRuntime.from_dict(runtime)
    assert read is not None
    return read.to_dict()


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_pods_of_the_runtime_keep_to_the_schemas_of_kubernetes(version: str) -> None:
    (runtime,) = of_kind("multi-node", "TrainingRuntime")
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", **node["template"], "metadata": {"name": "a"}}
    kubernetes_validate.validate(job, version, strict=True)
    misspelt = deepcopy(job)
    misspelt["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        kubernetes_validate.validate(misspelt, version, strict=True)


def test_the_sdk_of_kubeflow_trainer_can_use_the_runtime() -> None:
    manifest = named("multi-node", "TrainingRuntime", LaunchConfig().runtime)
    runtime = models.TrainerV1alpha1TrainingRuntime.from_dict(manifest)
    assert runtime is not None
    framework = runtime.metadata.labels["trainer.kubeflow.org/framework"]
    trainer = get_runtime_trainer(framework, runtime.spec.template.spec.replicated_jobs, runtime.spec.ml_policy)
    assert (trainer.framework, trainer.num_nodes, trainer.device, trainer.device_count) == ("torch", 2, "gpu", "2")
    assert trainer.image.split(":")[0].endswith("/vismem-train")


@overlays
def test_everything_lies_in_the_namespace_and_no_name_occurs_twice(overlay: str) -> None:
    assert named(overlay, "Namespace", LaunchConfig().namespace)
    rest = [manifest for manifest in render(overlay) if manifest["kind"] not in CLUSTER_WIDE]
    assert {manifest["metadata"].get("namespace") for manifest in rest} == {LaunchConfig().namespace}
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in render(overlay)]
    assert len(names) == len(set(names))


# --- what they say of each other ---


@overlays
def test_every_secret_configmap_claim_and_account_that_is_named_exists(overlay: str) -> None:
    made = {kind: {m["metadata"]["name"] for m in of_kind(overlay, kind)} for kind in ("ConfigMap", "ServiceAccount")}
    made["PersistentVolumeClaim"] = {m["metadata"]["name"] for m in of_kind(overlay, "PersistentVolumeClaim")}
    for key, template in pod_templates(overlay).items():
        assert template["spec"]["serviceAccountName"] in made["ServiceAccount"], key
        assert {claim["claimName"] for claim in values(template, "persistentVolumeClaim")} <= (
            made["PersistentVolumeClaim"]
        ), key
        for name in ("configMapRef", "configMapKeyRef", "configMap"):
            assert {reference["name"] for reference in values(template, name)} <= made["ConfigMap"], key
        for reference in [*values(template, "secretRef"), *values(template, "secretKeyRef")]:
            known = OPTIONAL_SECRETS if reference.get("optional") else SECRETS
            assert reference["name"] in known, key
            assert reference.get("key") in {None, *known[reference["name"]]}, key
    for binding in of_kind(overlay, "RoleBinding"):
        assert named(overlay, "Role", binding["roleRef"]["name"])
        assert {subject["name"] for subject in binding["subjects"]} <= made["ServiceAccount"]


@overlays
def test_every_volume_that_is_mounted_exists_and_every_one_that_exists_is_mounted(overlay: str) -> None:
    for key, template in pod_templates(overlay).items():
        mounted = {mount["name"] for mounts in values(template, "volumeMounts") for mount in mounts}
        assert mounted == {volume["name"] for volume in template["spec"].get("volumes", [])}, key


@overlays
def test_selectors_match_the_pods_that_they_are_meant_for(overlay: str) -> None:
    pods = labels_of_pods(overlay)
    for deployment in of_kind(overlay, "Deployment"):
        key = f"Deployment/{deployment['metadata']['name']}"
        assert [pod for pod in pods if selects(deployment["spec"]["selector"], pods[pod])] == [key]
    for service in of_kind(overlay, "Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        (key,) = [pod for pod in pods if selects(selector, pods[pod])]
        ports = {port["name"] for listed in values(pod_templates(overlay)[key]["spec"], "ports") for port in listed}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in of_kind(overlay, "PodDisruptionBudget"):
        assert [pod for pod in pods if selects(budget["spec"]["selector"], pods[pod])] == ["Deployment/triton"]
    for key, template in pod_templates(overlay).items():
        for selector in values(template["spec"], "labelSelector"):  # spread over nodes, or keep together
            assert selects(selector, pods[key])


@overlays
def test_network_policies_name_pods_and_ports_that_exist(overlay: str) -> None:
    pods = labels_of_pods(overlay)
    seen = [*pods.values(), *({label: "any"} for label in OUTSIDE_PODS), {"vismem/triton-client": "true"}]
    ports = {port["name"]: port["containerPort"] for _, c in containers(overlay) for port in c.get("ports", [])}
    for policy in of_kind(overlay, "NetworkPolicy"):
        for selector in values(policy, "podSelector"):
            assert any(selects(selector, labels) for labels in seen), policy["metadata"]["name"]
        for port in (port["port"] for listed in values(policy, "ports") for port in listed):
            assert isinstance(port, int) or port in ports, policy["metadata"]["name"]


@overlays
def test_pods_may_do_what_their_neighbours_expect_of_them(overlay: str) -> None:
    """Both ends of a connection are open: the caller's egress and the other's ingress."""
    connections = [("Deployment/mlflow", "CronJob/publish-champion", "http")]
    if overlay == "multi-node":
        connections.append(("TrainingRuntime/vismem-torch/node", "TrainingRuntime/vismem-torch/node", None))
    for server, client, port in connections:
        assert allowed(overlay, "ingress", "from", server, client, port)
        assert allowed(overlay, "egress", "to", client, server, port)
    assert not allowed(overlay, "ingress", "from", "Deployment/triton", "Deployment/mlflow", "grpc")
    assert not allowed(overlay, "egress", "to", "Deployment/triton", "Deployment/mlflow", "http")


def allowed(overlay: str, way: str, side: str, owner: str, peer: str, port: str | None) -> bool:
    pods = labels_of_pods(overlay)
    for policy in of_kind(overlay, "NetworkPolicy"):
        if selects(policy["spec"]["podSelector"], pods[owner]):
            for rule in policy["spec"].get(way, []):
                peers = [one["podSelector"] for one in rule.get(side, []) if set(one) == {"podSelector"}]
                open_ports = {one["port"] for one in rule.get("ports", [])}
                if any(selects(one, pods[peer]) for one in peers) and (not open_ports or port in open_ports):
                    return True
    return False


@overlays
def test_nothing_may_talk_that_is_not_named(overlay: str) -> None:
    deny = named(overlay, "NetworkPolicy", "default-deny")
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in of_kind(overlay, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"], f"{policy['metadata']['name']} lets everybody in"


@overlays
def test_the_autoscaler_owns_tritons_replicas_and_its_metrics_come_from_the_adapters_rules(overlay: str) -> None:
    (scaler,) = of_kind(overlay, "HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    assert "replicas" not in named(overlay, target["kind"], target["name"])["spec"]
    rules = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    offered = {}
    for rule in rules:
        series = rule["seriesQuery"].split("{")[0]
        assert re.fullmatch(rule["name"]["matches"], series)
        assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
        offered[rule["name"]["as"]] = rule["metricsQuery"]
    asked = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    assert asked == list(offered)
    assert "nv_inference_queue_duration_us" in offered[asked[0]]


@overlays
def test_triton_keeps_serving_while_it_scales_down_or_a_node_is_drained(overlay: str) -> None:
    replicas = named(overlay, "HorizontalPodAutoscaler", "triton")["spec"]
    budget = named(overlay, "PodDisruptionBudget", "triton")["spec"]
    assert budget["maxUnavailable"] == 1
    assert replicas["minReplicas"] == (2 if overlay == "multi-node" else 1)  # one node cannot be drained and serve on
    assert replicas["minReplicas"] < replicas["maxReplicas"]


# --- what the rest of the project says of them ---


def test_training_on_several_nodes_finds_its_runtime_and_its_volume() -> None:
    how = LaunchConfig()
    assert named("multi-node", "TrainingRuntime", how.runtime)
    claim = named("multi-node", "PersistentVolumeClaim", how.claim)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (node,) = pod_templates("multi-node")[f"TrainingRuntime/{how.runtime}/node"]["spec"]["containers"]
    mounts = {mount["mountPath"] for mount in node["volumeMounts"]}
    assert {"/shared", "/dev/shm"} <= mounts
    volumes = pod_templates("multi-node")[f"TrainingRuntime/{how.runtime}/node"]["spec"]["volumes"]
    assert [volume["emptyDir"]["medium"] for volume in volumes if volume["name"] == "shm"] == ["Memory"]


def test_the_readme_shows_how_each_secret_is_made() -> None:
    text = (KUBERNETES / "README.md").read_text()
    for name, keys in (SECRETS | OPTIONAL_SECRETS).items():
        command = re.search(rf"create secret generic {name} (.*?)(?<!\\)\n", text, re.DOTALL)
        assert command, name
        assert keys <= set(re.findall(r"--from-literal=(\w+)=", command[1])), name
