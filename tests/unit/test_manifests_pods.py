"""The pods of each overlay of deploy/kubernetes: confined, sized, probed, with least rights and no secret in plain."""

import os
import re
import sqlite3
import subprocess
import sys
from copy import deepcopy
from itertools import product
from pathlib import Path

import published
import pytest
from kubernetes.utils.quantity import parse_quantity as size
from manifests import (
    KUBERNETES,
    LARGE,
    OVERLAYS,
    PULL_SECRET,
    ROOT,
    SEVERAL_NODES,
    containers,
    environment_of,
    named,
    namespace_of,
    of_kind,
    overlays,
    pod_templates,
    servers,
    values,
)

from vismem import rollout
from vismem.config import resolve
from vismem.serving.command import PROFILE_VARIABLE
from vismem.serving.repository import MANIFEST_VARIABLE

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
    assert with_gpu == ({"TrainingRuntime/vismem-torch/node/node"} if overlay in SEVERAL_NODES else set())


@overlays
def test_images_are_those_that_the_overlay_names(overlay: str) -> None:
    found = {container["image"] for _, container in containers(overlay)}
    assert found == {f"registry.example.com/{name}:0.2.0" for name in ("vismem-train", "vismem-serve")}


@overlays
def test_whatever_serves_has_all_three_probes(overlay: str) -> None:
    serving = {key: container for key, container in containers(overlay) if "ports" in container}
    assert len(serving) == 3
    for container in serving.values():
        ports = {port["name"] for port in container["ports"]}
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert {get["port"] for get in values(container[name], "httpGet")} <= ports
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 300


@overlays
def test_tritons_probes_ask_it_a_question_and_leave_it_the_time_to_answer(overlay: str) -> None:
    """tests/e2e/test_triton_health.py runs the very command."""
    (triton,) = named(overlay, "Deployment", servers(overlay))["spec"]["template"]["spec"]["containers"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = triton[name]["exec"]["command"]
        assert command[:4] == ["python", "-m", "vismem.serving.probe", "--timeout"]
        assert triton[name]["timeoutSeconds"] >= float(command[4]) + 5
    liveness = triton["livenessProbe"]
    assert liveness["failureThreshold"] * liveness["periodSeconds"] >= 120  # no haste in killing what only is slow


@overlays
def test_what_a_pod_serves_stands_in_its_template_and_applying_again_leaves_it(overlay: str) -> None:
    """Writer and readers agree on folder and annotations; the readers cannot write."""
    (job,) = pod_templates(overlay)["CronJob/rollout"]["spec"]["containers"]
    assert job["command"][3:5] == ["--to", "/models"]
    (written,) = [mount for mount in job["volumeMounts"] if mount["mountPath"] == "/models"]
    for name in (servers(overlay), rollout.CANARY):
        template = pod_templates(overlay)[f"Deployment/{name}"]
        (triton,) = template["spec"]["containers"]
        (read,) = [mount for mount in triton["volumeMounts"] if mount["mountPath"] == "/models"]
        assert (written.get("readOnly", False), read["readOnly"]) == (False, True)
        pins = {rollout.VERSION: "7", rollout.MANIFEST: "abc"}
        assert environment_of(triton, pins)["MODEL_REPOSITORY"] == "/models/releases/7"
        assert environment_of(triton, pins)[MANIFEST_VARIABLE] == "abc"
        assert environment_of(triton, {})["MODEL_REPOSITORY"] == "/models/releases/", "before the first rollout"
        assert not pins.keys() & template["metadata"]["annotations"].keys()
    assert "MODEL_REPOSITORY" in (ROOT / "deploy" / "docker" / "serve.sh").read_text()


@pytest.mark.parametrize("overlay", sorted(OVERLAYS.keys() - {"kserve"}))  # that: test_manifests_kserve.py
def test_a_canary_is_a_server_of_which_there_is_none_until_a_rollout_asks_for_one(overlay: str) -> None:
    named_by = "app.kubernetes.io/name"
    servers, canary = (deepcopy(named(overlay, "Deployment", of)["spec"]) for of in (rollout.SERVERS, rollout.CANARY))
    assert (canary.pop("replicas"), canary.pop("strategy")) == (0, {"type": "Recreate"})
    for labels in (canary["selector"]["matchLabels"], canary["template"]["metadata"]["labels"]):
        assert labels[named_by] == rollout.CANARY
        labels[named_by] = rollout.SERVERS
    assert servers.pop("strategy")["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}, "one pod serves on"
    spread = servers["template"]["spec"].pop("topologySpreadConstraints", None)
    assert bool(spread) == (overlay in SEVERAL_NODES)
    assert canary == servers
    (triton,) = servers["template"]["spec"]["containers"]
    startup = triton["startupProbe"]
    assert servers["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]


@overlays
def test_rollouts_and_probes_take_one_profile(overlay: str) -> None:
    assert named(overlay, "ConfigMap", "vismem")["data"] == {PROFILE_VARIABLE: ""}
    for key in ("CronJob/rollout", f"Deployment/{servers(overlay)}", "Deployment/triton-canary"):
        (container,) = pod_templates(overlay)[key]["spec"]["containers"]
        (variable,) = [entry for entry in container["env"] if entry["name"] == PROFILE_VARIABLE]
        assert variable["valueFrom"] == {"configMapKeyRef": {"name": "vismem", "key": PROFILE_VARIABLE}}


@overlays
def test_mlflow_answers_under_the_names_of_its_service(overlay: str) -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    (port,) = [port["port"] for port in named(overlay, "Service", "mlflow")["spec"]["ports"]]
    (server,) = named(overlay, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry for entry in server["env"]}
    assert variables["NAMESPACE"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.namespace"}}
    assert list(variables).index("NAMESPACE") < list(variables).index(
        "MLFLOW_SERVER_ALLOWED_HOSTS"
    )  # else not expanded
    namespace = namespace_of(overlay)
    hosts = variables["MLFLOW_SERVER_ALLOWED_HOSTS"]["value"].replace("$(NAMESPACE)", namespace).split(",")
    for name in ("mlflow", f"mlflow.{namespace}", f"mlflow.{namespace}.svc", f"mlflow.{namespace}.svc.cluster.local"):
        assert is_allowed_host_header(hosts, f"{name}:{port}")
    assert not is_allowed_host_header(hosts, f"evil.example:{port}")
    asked = server["readinessProbe"]["httpGet"]
    assert "experiments/search" in asked["path"], "an answer from the database"
    assert is_allowed_host_header(hosts, asked["httpHeaders"][0]["value"])


def test_a_new_image_s_mlflow_finds_its_tables_or_their_older_form(tmp_path: Path) -> None:
    """A server makes tables and refuses those of another version; the command before it makes and upgrades them."""
    pod = named("single-gpu", "Deployment", "mlflow")["spec"]["template"]["spec"]
    (upgrade,) = pod["initContainers"]
    assert upgrade["image"] == pod["containers"][0]["image"]
    assert upgrade["envFrom"][0] in pod["containers"][0]["envFrom"]
    assert "$(" not in str(upgrade["command"]), "a command line shows the password to all of the machine"
    database = tmp_path / "mlflow.db"
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{database}"}
    for _ in range(2):
        subprocess.run([sys.executable, *upgrade["command"][1:]], env=environment, check=True)
        tables = sqlite3.connect(database).execute("select name from sqlite_master").fetchall()
        assert ("registered_models",) in tables


@overlays
def test_a_rollout_does_not_run_for_ever_nor_before_the_pods_had_their_time(overlay: str) -> None:
    """Training's jobs have their end from LaunchConfig.hours: tests/unit/test_trainer_adapter.py."""
    hour, job = 3600, named(overlay, "CronJob", "rollout")["spec"]["jobTemplate"]["spec"]
    assert job["activeDeadlineSeconds"] <= (5 * hour if overlay in LARGE else 2 * hour)
    most = named(overlay, "HorizontalPodAutoscaler", "triton")["spec"]["maxReplicas"]
    pods = named(overlay, "Deployment", "triton-canary")["spec"]["progressDeadlineSeconds"]
    assert job["activeDeadlineSeconds"] >= (2 + min(most, 2)) * pods


@overlays
def test_a_rollout_that_refused_is_not_tried_again_and_one_that_lost_its_node_is(overlay: str) -> None:
    job = named(overlay, "CronJob", "rollout")["spec"]["jobTemplate"]["spec"]
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [0]}},
    ]
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_the_sizes_for_7b_models_hold_one_with_graphs_and_its_training(tmp_path: Path) -> None:
    """The profile's base, as `vismem plan` sees it; docs/serving.md says that Triton holds about twice the bundle."""
    from vismem.plan import hollow, host_memory
    from vismem.plan.model import parameters

    base = str(published.save_published(tmp_path, "Qwen2.5-VL-7B-Instruct"))
    config = resolve("qwen2_5_vl_7b", {"base.model": base})
    model = hollow(config)
    bundle = 4 * sum(sum(parameters(part).values()) for part in (model, model.backbone.model))
    (triton,) = pod_templates("7b")["Deployment/triton"]["spec"]["containers"]
    assert size(triton["resources"]["limits"]["memory"]) > 2 * bundle + 2**30
    claim = named("7b", "PersistentVolumeClaim", "vismem-models")
    assert size(claim["spec"]["resources"]["requests"]["storage"]) > 4 * bundle
    mlflow = pod_templates("7b")["Deployment/mlflow"]["spec"]
    workers = int(mlflow["containers"][0]["command"][-1].removeprefix("--workers="))
    (uploads,) = [volume["emptyDir"]["sizeLimit"] for volume in mlflow["volumes"]]
    assert size(uploads) > workers * bundle
    (node,) = pod_templates("7b")["TrainingRuntime/vismem-torch/node"]["spec"]["containers"]
    gpus, memory = (node["resources"]["limits"][key] for key in ("nvidia.com/gpu", "memory"))
    assert (memory, int(gpus)) == (config.cluster["training_memory"], config.cluster["num_processes"])
    assert size(memory) > max(host_memory(config, int(gpus)).values())


# --- rights and secrets ---


@overlays
def test_images_may_come_from_a_registry_that_asks_for_a_key(overlay: str) -> None:
    """Also those of a run's steps: their pods have the pull secrets of its account."""
    for account in of_kind(overlay, "ServiceAccount"):
        assert account["imagePullSecrets"] == [{"name": PULL_SECRET}], account["metadata"]["name"]
    assert f"create secret docker-registry {PULL_SECRET} " in (KUBERNETES / "README.md").read_text()


@overlays
def test_only_runs_and_rollouts_have_rights_and_no_more_than_they_use(overlay: str) -> None:
    """What a rollout uses is recorded by tests/integration/test_rollout.py."""
    bound = {subject["name"] for binding in of_kind(overlay, "RoleBinding") for subject in binding["subjects"]}
    assert bound == {"vismem-pipeline", "rollout"}
    rights: dict[tuple[str, str], set[str]] = {}
    for rule in (rule for role in of_kind(overlay, "Role") for rule in role["rules"]):
        for right in product(rule["apiGroups"], rule["resources"]):
            rights.setdefault(right, set()).update(rule["verbs"])
    expected = {
        ("argoproj.io", "workflowtaskresults"): {"create", "patch"},
        ("", "configmaps"): {"get"},
        ("", "secrets"): {"get"},
        ("", "pods"): {"get", "list", "watch"},
        ("apps", "deployments"): {"get", "patch"},
    }
    if overlay in SEVERAL_NODES:
        expected[("trainer.kubeflow.org", "trainjobs")] = {"create", "get", "list", "watch", "delete"}
        expected[("trainer.kubeflow.org", "trainingruntimes")] = {"get"}
        expected[("", "pods/log")] = {"get"}
    if overlay == "kserve":
        expected[("serving.kserve.io", "inferenceservices")] = {"get", "patch"}
    assert rights == expected
    for role in of_kind(overlay, "Role"):
        for rule in role["rules"]:
            if {"secrets", "configmaps"} & set(rule["resources"]):
                assert rule["resourceNames"]
    assert not of_kind(overlay, "ClusterRole", "ClusterRoleBinding")


@overlays
def test_no_pod_here_but_a_rollout_gets_a_token_of_the_api(overlay: str) -> None:
    for key, template in pod_templates(overlay).items():
        assert template["spec"]["automountServiceAccountToken"] is (key == "CronJob/rollout"), key
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
def test_triton_holds_no_secret_but_its_clients_token_which_who_asks_it_has_too(overlay: str) -> None:
    token = {"name": "vismem-api", "key": "VISMEM_API_TOKEN", "optional": True}
    template = pod_templates(overlay)[f"Deployment/{servers(overlay)}"]
    assert [*values(template, "secretRef"), *values(template, "secretKeyRef"), *values(template, "envFrom")] == [token]
    assert token in values(pod_templates(overlay)["CronJob/rollout"], "secretKeyRef")
