"""The manifests of each install of deploy/kubernetes: valid, and their references to each other complete."""

import re
from copy import deepcopy
from textwrap import dedent

import kubernetes_validate
import pytest
import yaml
from kubeflow.trainer.backends.kubernetes.utils import get_runtime_trainer
from kubeflow_trainer_api import models
from kubernetes_validate.utils import all_versions
from manifests import (
    KUBERNETES,
    LARGE,
    OPTIONAL_SECRETS,
    OVERLAYS,
    SECRETS,
    SEVERAL_NODES,
    Manifest,
    in_cluster,
    labels_of_pods,
    named,
    namespace_of,
    of_kind,
    overlays,
    pod_templates,
    render,
    selects,
    servers,
    values,
)

from pipelines.pipeline import STAYS
from vismem.launch import LaunchConfig

OLDEST, NEWEST = "1.30.0", all_versions()[-1]  # the oldest that knows `preStop.sleep`
TRAINER, PROMETHEUS = "trainer.kubeflow.org/v1alpha1", "monitoring.coreos.com/v1"
OTHERS = (TRAINER, PROMETHEUS, "serving.kserve.io/v1beta1")  # no schemas of theirs are here

# --- each manifest by itself ---


@overlays
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_core_manifests_keep_to_the_schemas_of_kubernetes(overlay: str, version: str) -> None:
    core = [manifest for manifest in in_cluster(overlay) if manifest["apiVersion"] not in OTHERS]
    assert len(core) > 15
    for manifest in core:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_manifest_with_a_field_that_does_not_exist_is_refused() -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"port": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="port"):
        kubernetes_validate.validate(service, NEWEST, strict=True)


def test_only_training_on_several_nodes_needs_kubeflow_trainer() -> None:
    kinds = {overlay: [m["kind"] for m in render(overlay) if m["apiVersion"] == TRAINER] for overlay in OVERLAYS}
    assert kinds == {overlay: ["TrainingRuntime"] * (overlay in SEVERAL_NODES) for overlay in OVERLAYS}


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
    """That of Kubeflow Pipelines or of a profile; both are made by others, and a profile's must not be there before."""
    assert {manifest["metadata"].get("namespace") for manifest in render(overlay)} == {namespace_of(overlay)}
    assert not of_kind(overlay, "Namespace", "Profile")
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in render(overlay)]
    assert len(names) == len(set(names))


def test_the_profile_is_the_namespace_of_its_overlay() -> None:
    (profile,) = yaml.safe_load_all((KUBERNETES / "overlays/kubeflow-profile/profile.yaml").read_text())
    assert (profile["apiVersion"], profile["kind"]) == ("kubeflow.org/v1", "Profile")
    assert profile["metadata"] == {"name": namespace_of("kubeflow-profile")}
    assert set(profile["spec"]["owner"]) == {"kind", "name"}


@overlays
def test_the_namespace_stands_in_no_other_place_than_an_overlay_s_own(overlay: str) -> None:
    """A user changes it there, and nothing else: not in a value, an address or a selector."""
    other = "of-somebody-else"
    (file,) = [KUBERNETES / "overlays" / OVERLAYS[overlay][0] / "kustomization.yaml"]
    line = f"namespace: {namespace_of(overlay)}\n"
    assert file.read_text().count(line) == 1
    moved = yaml.safe_dump_all(render(overlay, ((line, f"namespace: {other}\n"),)))
    assert moved.replace(f"namespace: {other}", line.strip()) == yaml.safe_dump_all(render(overlay))
    assert not re.search(rf"\bnamespace: {namespace_of(overlay)}\b", moved)


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
def test_pods_that_mount_a_volume_of_one_node_stay_on_one_node(overlay: str) -> None:
    claims = {claim["metadata"]["name"]: claim["spec"] for claim in of_kind(overlay, "PersistentVolumeClaim")}
    at_one_node: dict[str, list[bool]] = {}
    for template in pod_templates(overlay).values():
        rules = template["spec"].get("affinity", {"podAffinity": {}})["podAffinity"]
        terms = rules.get("requiredDuringSchedulingIgnoredDuringExecution", [])
        near = [term["labelSelector"]["matchLabels"] for term in terms if "hostname" in term["topologyKey"]]
        for claim in {*values(template, "claimName")}:
            if claims[claim]["accessModes"] == ["ReadWriteOnce"]:
                kept = (
                    near == [{"vismem/volume": "models"}] and near[0].items() <= template["metadata"]["labels"].items()
                )
                at_one_node.setdefault(claim, []).append(kept)
    assert all(all(pods) for pods in at_one_node.values() if len(pods) > 1), at_one_node
    assert len(at_one_node.get("vismem-models", ())) == (0 if overlay in SEVERAL_NODES else 3)


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
        assert [pod for pod in pods if selects(budget["spec"]["selector"], pods[pod])] == [
            f"Deployment/{servers(overlay)}"
        ]
    for key, template in pod_templates(overlay).items():
        for selector in values(template["spec"], "labelSelector"):  # spread over nodes, or keep together
            assert selects(selector, pods[key])


@overlays
def test_the_autoscaler_owns_tritons_replicas_and_its_metrics_come_from_the_adapters_rules(overlay: str) -> None:
    (scaler,) = of_kind(overlay, "HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    assert "replicas" not in named(overlay, target["kind"], target["name"])["spec"]
    adapter = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())
    rules = adapter["rules"]["custom"]
    offered = {}
    for rule in rules:
        series = rule["seriesQuery"].split("{")[0]
        assert re.fullmatch(rule["name"]["matches"], series)
        assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
        offered[rule["name"]["as"]] = rule["metricsQuery"]
    asked = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    assert asked == list(offered)
    assert "nv_inference_queue_duration_us" in offered[asked[0]]
    assert ".monitoring.svc" in adapter["prometheus"]["url"], "the chart's own Prometheus is that of `default`"


@overlays
def test_triton_keeps_serving_while_a_node_is_drained_and_one_node_alone_can_be_drained(overlay: str) -> None:
    replicas = named(overlay, "HorizontalPodAutoscaler", "triton")["spec"]
    budget = named(overlay, "PodDisruptionBudget", "triton")["spec"]
    # one node cannot be drained and serve on
    assert (budget["maxUnavailable"], replicas["minReplicas"]) == ((1, 2) if overlay in SEVERAL_NODES else ("100%", 1))
    assert replicas["minReplicas"] < replicas["maxReplicas"]


@pytest.mark.parametrize("overlay", SEVERAL_NODES)
def test_servers_are_on_different_nodes_and_a_release_finds_room_for_one_more(overlay: str) -> None:
    """As many servers as nodes, beside others with taints: neither those nor the pods of before count."""
    template = pod_templates(overlay)[f"Deployment/{servers(overlay)}"]
    (spread,) = template["spec"]["topologySpreadConstraints"]
    assert (spread["maxSkew"], spread["whenUnsatisfiable"]) == (1, "DoNotSchedule")
    assert (spread["nodeTaintsPolicy"], spread["matchLabelKeys"]) == ("Honor", ["pod-template-hash"])


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


def test_the_readme_says_how_a_run_may_read_another_secret_of_the_artifact_store() -> None:
    (patch,) = re.findall(r"```yaml\n( +patches:.*?)```", (KUBERNETES / "README.md").read_text(), re.DOTALL)
    manifests = render("single-gpu", (("images:\n", f"{dedent(patch)}images:\n"),))
    (role,) = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == ("Role", "vismem-pipeline")]
    (names,) = [rule["resourceNames"] for rule in role["rules"] if rule["resources"] == ["secrets"]]
    assert names == ["mlpipeline-minio-artifact", "artifact-store"]


@pytest.mark.parametrize("overlay", SEVERAL_NODES)
def test_a_node_that_trains_is_not_evicted_to_save_nodes(overlay: str) -> None:
    node = pod_templates(overlay)["TrainingRuntime/vismem-torch/node"]
    assert node["metadata"]["annotations"] == STAYS


@overlays
def test_a_server_that_stops_may_end_its_answers_before_it_is_killed(overlay: str) -> None:
    for key, template in pod_templates(overlay).items():
        for container in template["spec"]["containers"]:
            drains = [float(v["value"]) for v in container.get("env", []) if v["name"] == "VISMEM_DRAIN_SECONDS"]
            if drains:
                needs = container["lifecycle"]["preStop"]["sleep"]["seconds"] + drains[0] + 15
                assert template["spec"]["terminationGracePeriodSeconds"] >= needs, key
                assert drains == [300.0 if overlay in LARGE else 30.0], key
