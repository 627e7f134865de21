"""What `kubectl apply -k` would send for each overlay of deploy/kubernetes: valid, complete and with least rights."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow.trainer.backends.kubernetes.utils import get_runtime_trainer
from kubeflow_trainer_api import models
from kubernetes_validate.utils import all_versions

from vismem.launch import LaunchConfig

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
OLDEST, NEWEST = "1.30.0", all_versions()[-1]  # the oldest that knows `preStop.sleep`
TRAINER = "trainer.kubeflow.org/v1alpha1"
SECRETS = {  # made by hand, see deploy/kubernetes/README.md: those that must be there, and their keys
    "vismem-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3"},
    "vismem-mlflow": {"MLFLOW_TRACKING_URI"},
    "vismem-mlflow-server": {"MLFLOW_BACKEND_STORE_URI"},
}
OPTIONAL_SECRETS = {"vismem-huggingface": {"HF_TOKEN"}}
OUTSIDE_PODS = ("workflows.argoproj.io/workflow",)  # labels of pods that others make in the namespace: steps of a run
CLUSTER_WIDE = {"Namespace"}

Manifest = dict[str, Any]

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


@lru_cache
def render(overlay: str) -> list[Manifest]:
    kubectl = Path(sys.executable).with_name("kubectl")
    command = [kubectl, "kustomize", KUBERNETES / "overlays" / overlay]
    return list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    return [manifest for manifest in render(overlay) if manifest["kind"] in kinds]


def named(overlay: str, kind: str, name: str) -> Manifest:
    (found,) = [manifest for manifest in of_kind(overlay, kind) if manifest["metadata"]["name"] == name]
    return found


def pod_templates(overlay: str) -> dict[str, Manifest]:
    """Everything that makes pods, by "kind/name"."""
    found = {}
    for manifest in render(overlay):
        key = f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["kind"] == "Deployment":
            found[key] = manifest["spec"]["template"]
        elif manifest["kind"] == "CronJob":
            found[key] = manifest["spec"]["jobTemplate"]["spec"]["template"]
        elif manifest["kind"] == "TrainingRuntime":
            for job in manifest["spec"]["template"]["spec"]["replicatedJobs"]:
                found[f"{key}/{job['name']}"] = job["template"]["spec"]["template"]
        else:
            assert "template" not in manifest.get("spec", {}), f"{key} makes pods, and these tests do not look at them"
    return found


def containers(overlay: str) -> Iterator[tuple[str, Manifest]]:
    for key, template in pod_templates(overlay).items():
        for container in template["spec"].get("initContainers", []) + template["spec"]["containers"]:
            yield f"{key}/{container['name']}", container


def values(node: Any, key: str) -> Iterator[Any]:
    """What stands under `key` anywhere below `node`."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        for below in node.values():
            yield from values(below, key)
    elif isinstance(node, list):
        for below in node:
            yield from values(below, key)


def selects(selector: Manifest, labels: Manifest) -> bool:
    """Whether a label selector (Equality, Exists) matches."""
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "Exists"
        if expression["key"] not in labels:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def labels_of_pods(overlay: str) -> dict[str, Manifest]:
    return {key: template["metadata"]["labels"] for key, template in pod_templates(overlay).items()}


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


@overlays
def test_manifests_of_kubeflow_trainer_keep_to_its_api(overlay: str) -> None:
    """Its models drop what they do not know, so that the way there and back shows it."""
    for manifest in render(overlay):
        if manifest["apiVersion"] == TRAINER:
            assert manifest["kind"] == "TrainingRuntime"
            read = models.TrainerV1alpha1TrainingRuntime.from_dict(manifest)
            assert read is not None
            assert read.to_dict() == manifest


@overlays
def test_pods_of_kubeflow_trainer_keep_to_the_schemas_of_kubernetes(overlay: str) -> None:
    for runtime in of_kind(overlay, "TrainingRuntime"):
        for job in runtime["spec"]["template"]["spec"]["replicatedJobs"]:
            manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **job["template"]}
            kubernetes_validate.validate({**manifest, "metadata": {"name": "a"}}, NEWEST, strict=True)


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


# --- containers ---


@overlays
def test_every_container_meets_the_restricted_pod_security_standard(overlay: str) -> None:
    dockerfiles = (ROOT / "deploy" / "docker").glob("*.Dockerfile")
    users = {line for file in dockerfiles for line in file.read_text().splitlines() if line.startswith("USER")}
    assert users == {"USER 1000:1000"}
    for key, template in pod_templates(overlay).items():
        context = template["spec"]["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"], context["runAsGroup"]) == (True, 1000, 1000), key
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, key
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(template["spec"]), key
        assert not list(values(template, "hostPath")), key
    for key, container in containers(overlay):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, key


@overlays
def test_every_container_says_what_it_needs_and_only_training_asks_for_a_gpu(overlay: str) -> None:
    with_gpu = set()
    for key, container in containers(overlay):
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"]), key
        assert "memory" in resources["limits"], key
        if "nvidia.com/gpu" in resources["limits"]:
            with_gpu.add(key)
    assert with_gpu == ({"TrainingRuntime/vismem-torch/node/node"} if overlay == "multi-node" else set())


@overlays
def test_images_are_those_that_the_overlay_names(overlay: str) -> None:
    found = {container["image"] for _, container in containers(overlay)}
    assert found == {f"registry.example.com/{name}:0.1.0" for name in ("vismem-train", "vismem-serve")}


@overlays
def test_whatever_serves_has_all_three_probes(overlay: str) -> None:
    serving = {key: container for key, container in containers(overlay) if "ports" in container}
    assert len(serving) == 2
    for container in serving.values():
        ports = {port["name"] for port in container["ports"]}
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert {get["port"] for get in values(container[name], "httpGet")} <= ports
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 300


@overlays
def test_tritons_probes_ask_it_a_question_and_leave_it_the_time_to_answer(overlay: str) -> None:
    """tests/e2e/test_triton.py runs the very command."""
    (triton,) = named(overlay, "Deployment", "triton")["spec"]["template"]["spec"]["containers"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = triton[name]["exec"]["command"]
        assert command[:4] == ["python", "-m", "vismem.serving.probe", "--timeout"]
        assert triton[name]["timeoutSeconds"] >= float(command[4]) + 5
    liveness = triton["livenessProbe"]
    assert liveness["failureThreshold"] * liveness["periodSeconds"] >= 120  # no haste in killing what only is slow


@overlays
def test_triton_is_told_where_the_published_model_lies(overlay: str) -> None:
    """Writer and readers agree on the folder; the readers cannot write."""
    (publish,) = pod_templates(overlay)["CronJob/publish-champion"]["spec"]["containers"]
    (triton,) = pod_templates(overlay)["Deployment/triton"]["spec"]["containers"]
    folder = publish["command"][-1]
    (written,) = [mount for mount in publish["volumeMounts"] if mount["mountPath"] == folder]
    (read,) = [mount for mount in triton["volumeMounts"] if mount["mountPath"] == folder]
    assert (written.get("readOnly", False), read["readOnly"]) == (False, True)
    environment = {variable["name"]: variable.get("value") for variable in triton["env"]}
    assert environment["MODEL_REPOSITORY"] == f"{folder}/current"
    assert "MODEL_REPOSITORY" in (ROOT / "deploy" / "docker" / "serve.sh").read_text()


@overlays
def test_mlflow_answers_under_the_names_of_its_service(overlay: str) -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    service = named(overlay, "Service", "mlflow")
    (port,) = [port["port"] for port in service["spec"]["ports"]]
    hosts = named(overlay, "ConfigMap", "mlflow")["data"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    namespace = service["metadata"]["namespace"]
    for name in ("mlflow", f"mlflow.{namespace}", f"mlflow.{namespace}.svc", f"mlflow.{namespace}.svc.cluster.local"):
        assert is_allowed_host_header(hosts, f"{name}:{port}")
    assert not is_allowed_host_header(hosts, f"evil.example:{port}")


# --- rights and secrets ---


@overlays
def test_only_a_runs_account_has_rights_and_no_more_than_it_uses(overlay: str) -> None:
    bound = {subject["name"] for binding in of_kind(overlay, "RoleBinding") for subject in binding["subjects"]}
    assert bound == {"vismem-pipeline"}
    rights = {
        (group, resource): set(rule["verbs"])
        for role in of_kind(overlay, "Role")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    expected = {
        ("argoproj.io", "workflowtaskresults"): {"create", "patch"},
        ("", "configmaps"): {"get"},
        ("", "secrets"): {"get"},
        ("", "pods"): {"get", "list", "watch"},
    }
    if overlay == "multi-node":
        expected[("trainer.kubeflow.org", "trainjobs")] = {"create", "get", "list", "watch", "delete"}
        expected[("trainer.kubeflow.org", "trainingruntimes")] = {"get"}
        expected[("", "pods/log")] = {"get"}
    assert rights == expected
    for role in of_kind(overlay, "Role"):
        for rule in role["rules"]:
            if {"secrets", "configmaps"} & set(rule["resources"]):
                assert len(rule["resourceNames"]) == 1
    assert not of_kind(overlay, "ClusterRole", "ClusterRoleBinding")


@overlays
def test_no_pod_here_gets_a_token_of_the_api(overlay: str) -> None:
    for key, template in pod_templates(overlay).items():
        assert template["spec"]["automountServiceAccountToken"] is False, key
    accounts = {
        m["metadata"]["name"]: m.get("automountServiceAccountToken") for m in of_kind(overlay, "ServiceAccount")
    }
    assert [name for name, automount in accounts.items() if automount is not False] == ["vismem-pipeline"]


@overlays
def test_no_secret_stands_in_a_manifest(overlay: str) -> None:
    assert not of_kind(overlay, "Secret")
    secret = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|_URI$")
    for key, container in containers(overlay):
        for variable in container.get("env", []):
            if secret.search(variable["name"]):
                assert "value" not in variable, key
    for settings in of_kind(overlay, "ConfigMap"):
        assert not [name for name in settings["data"] if secret.search(name)]


@overlays
def test_triton_holds_no_secret(overlay: str) -> None:
    template = pod_templates(overlay)["Deployment/triton"]
    assert not [*values(template, "secretRef"), *values(template, "secretKeyRef"), *values(template, "envFrom")]


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
