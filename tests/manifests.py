"""What `kubectl apply -k` would send for each install of deploy/kubernetes, and ways to look into it."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from kserve_rules import deployment_of

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
NODES, ALL = ("/single-gpu  #", "/multi-node  #"), ("  # - ../../", "  - ../../")
KSERVE = ("  # - ../../components/kserve", "  - ../../components/kserve")
OWN_MLFLOW = ("  # - ../../components/external-mlflow", "  - ../../components/external-mlflow")
OVERLAYS = {  # installs: an overlay, its namespace, and what of its components is exchanged, as its comments say
    "single-gpu": ("standalone", "kubeflow", ()),
    "multi-node": ("standalone", "kubeflow", (NODES,)),
    "kubeflow-profile": ("kubeflow-profile", "vismem", ()),
    "7b": ("kubeflow-profile", "vismem", (NODES, ALL, OWN_MLFLOW[::-1], KSERVE[::-1])),
    "kserve": ("standalone", "kubeflow", (NODES, ALL, OWN_MLFLOW[::-1])),
}
SEVERAL_NODES, LARGE = ("7b", "kserve", "multi-node"), ("7b", "kserve")
SECRETS = {  # made by hand, see deploy/kubernetes/README.md: those that must be there, and their keys
    "vismem-mlflow": {"MLFLOW_TRACKING_URI"},
    "vismem-mlflow-server": {"MLFLOW_BACKEND_STORE_URI"},
}
PULL_SECRET = "vismem-registry"
OPTIONAL_SECRETS = {
    "vismem-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3"},
    "vismem-huggingface": {"HF_TOKEN"},
    "vismem-api": {"VISMEM_API_TOKEN"},
}

Manifest = dict[str, Any]

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


@lru_cache
def render(overlay: str, more: tuple[tuple[str, str], ...] = ()) -> list[Manifest]:
    """All manifests of an install, as kustomize makes them of a copy that was edited as its user would, and `more`."""
    name, _, edits = OVERLAYS[overlay]
    with tempfile.TemporaryDirectory() as folder:
        copied = shutil.copytree(KUBERNETES, Path(folder) / "kubernetes")
        file = copied / "overlays" / name / "kustomization.yaml"
        text = file.read_text()
        for old, new in (*edits, *more):
            assert old in text
            text = text.replace(old, new)
        file.write_text(text)
        return kustomize(file.parent)


def kustomize(folder: Path) -> list[Manifest]:
    """All manifests of a folder with a kustomization.yaml."""
    command = [Path(sys.executable).with_name("kubectl"), "kustomize", folder]
    return list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@lru_cache
def in_cluster(overlay: str) -> list[Manifest]:
    """Them, and the Deployments that KServe makes."""
    made = [deployment_of(manifest) for manifest in render(overlay) if manifest["kind"] == "InferenceService"]
    return [*render(overlay), *made]


def servers(overlay: str) -> str:
    """The Deployment of Triton's pods."""
    return "triton-predictor" if overlay == "kserve" else "triton"


def namespace_of(overlay: str) -> str:
    """Where an install lies."""
    return OVERLAYS[overlay][1]


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    """Those of these kinds."""
    return [manifest for manifest in in_cluster(overlay) if manifest["kind"] in kinds]


def named(overlay: str, kind: str, name: str) -> Manifest:
    """The only one of that kind and name."""
    (found,) = [manifest for manifest in of_kind(overlay, kind) if manifest["metadata"]["name"] == name]
    return found


def pod_templates(overlay: str) -> dict[str, Manifest]:
    """Everything that makes pods, by "kind/name"."""
    found = {}
    for manifest in in_cluster(overlay):
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
    """Every container, with the key of what makes its pod and its name."""
    for key, template in pod_templates(overlay).items():
        for container in template["spec"].get("initContainers", []) + template["spec"]["containers"]:
            yield f"{key}/{container['name']}", container


def environment_of(container: Manifest, annotations: Manifest) -> dict[str, str]:
    """What the kubelet makes of a container's variables that name values, annotations of the pod, or each other."""
    found: dict[str, str] = {}
    for variable in container["env"]:
        if "value" in variable:
            known = re.compile(r"\$\((\w+)\)")
            found[variable["name"]] = known.sub(lambda match: found.get(match[1], match[0]), variable["value"])
            continue
        path = variable["valueFrom"].get("fieldRef", {}).get("fieldPath", "")
        if key := re.fullmatch(r"metadata\.annotations\['(.+)'\]", path):
            found[variable["name"]] = annotations.get(key[1], "")
    return found


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
    """Whether a label selector (equality, Exists) matches."""
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "Exists"
        if expression["key"] not in labels:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def labels_of_pods(overlay: str) -> dict[str, Manifest]:
    """The labels that each kind of pod gets."""
    return {key: template["metadata"]["labels"] for key, template in pod_templates(overlay).items()}
