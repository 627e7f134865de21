"""The component `kserve` of deploy/kubernetes: an InferenceService in place of a Deployment, with the same pods.

The schema of its CRD, two megabytes, is read from a checkout of github.com/kserve/kserve that KSERVE_CHECKOUT names.
"""

import os
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from kserve_rules import CONTAINER, EXTENSIONS, deployment_of
from manifests import KSERVE, OVERLAYS, Manifest, named, render

from vismem import rollout

CRD = Path(os.environ.get("KSERVE_CHECKOUT", "none")) / "config/crd/full/serving.kserve.io_inferenceservices.yaml"
WITHOUT = OVERLAYS.keys() - {"kserve"}
overlays = pytest.mark.parametrize("overlay", sorted(WITHOUT))


def service_of(overlay: str) -> Manifest:
    """The only one, where the component is added to an install."""
    (found,) = [manifest for manifest in render(overlay, (KSERVE,)) if manifest["kind"] == "InferenceService"]
    return found


@overlays
def test_pods_are_those_of_the_deployment_with_what_kserve_adds(overlay: str) -> None:
    """Also what the other components made of it: volumes, sizes, strategy, nodes."""
    ours, theirs = (deepcopy(found) for found in (named(overlay, "Deployment", "triton"), service_of(overlay)))
    made = deployment_of(theirs)["spec"]
    expected = ours["spec"]
    assert made["strategy"] == expected["strategy"]
    metadata, pod = made["template"]["metadata"], made["template"]["spec"]
    for kind in ("labels", "annotations"):
        assert expected["template"]["metadata"][kind].items() <= metadata[kind].items()
    (container,), (before,) = pod["containers"], expected["template"]["spec"]["containers"]
    assert (container.pop("name"), before.pop("name")) == (CONTAINER, "triton")
    assert container["env"].pop() == {"name": "INFERENCE_SERVICE_NAME", "value": "triton"}
    assert str(container["resources"]["limits"].pop("cpu")) == before["resources"]["requests"]["cpu"]
    assert pod == expected["template"]["spec"]


@overlays
def test_what_the_component_changes_is_the_deployment_and_who_refers_to_it(overlay: str) -> None:
    def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
        return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}

    before, after = by_name(render(overlay)), by_name(render(overlay, (KSERVE,)))
    assert before.keys() ^ after.keys() == {("Deployment", "triton"), ("InferenceService", "triton")}
    changed = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    assert changed == {("HorizontalPodAutoscaler", "triton"), ("CronJob", "rollout"), ("Role", "rollout")}


def test_the_rollout_is_told_of_it_and_may_change_it_alone_and_read_the_deployment() -> None:
    (job,) = named("kserve", "CronJob", "rollout")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert job["command"][-1] == "--kserve"
    rules = {tuple(rule["resourceNames"]): (rule["resources"], rule["verbs"]) for rule in
             named("kserve", "Role", "rollout")["rules"]}  # fmt: skip
    made = deployment_of(service_of("single-gpu"))["metadata"]["name"]
    assert rules == {
        (rollout.SERVERS,): (["inferenceservices"], ["get", "patch"]),
        (rollout.CANARY,): (["deployments"], ["get", "patch"]),
        (made,): (["deployments"], ["get"]),
    }
    assert made == rollout.PREDICTOR
    group, version, _ = rollout.INFERENCE_SERVICE
    assert service_of("single-gpu")["apiVersion"] == f"{group}/{version}"


def test_a_predictor_holds_the_fields_of_a_pod_and_of_kserve_s_extensions_alone() -> None:
    """The pod's are held to Kubernetes' schemas in test_manifests.py, in the Deployment that KServe makes."""
    service = service_of("7b")
    assert service.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert service["spec"].keys() == {"predictor"}
    pod = deployment_of(service)["spec"]["template"]["spec"]
    assert service["spec"]["predictor"].keys() == {*pod, *EXTENSIONS}


@pytest.mark.skipif(not CRD.is_file(), reason="KSERVE_CHECKOUT names no checkout of kserve/kserve")
@overlays
def test_it_keeps_to_the_schema_of_kserve(overlay: str) -> None:
    service = service_of(overlay)
    schema().validate(service)
    for place in (service["spec"]["predictor"], service["spec"]["predictor"]["containers"][0]):
        place["misspelt"] = 1
        with pytest.raises(ValidationError, match="misspelt"):
            schema().validate(service)
        del place["misspelt"]


@lru_cache
def schema() -> Draft202012Validator:
    """The version's, as the API server reads it with strict validation: what it does not name is an error."""
    definition = yaml.load(CRD.read_text(), yaml.CSafeLoader)
    (version,) = [found for found in definition["spec"]["versions"] if found["name"] == "v1beta1"]
    whole = version["schema"]["openAPIV3Schema"]
    close(whole)
    whole["properties"]["metadata"] = {"type": "object"}  # the API server's own
    return Draft202012Validator(whole)


def close(node: Any) -> None:
    if isinstance(node, list):
        for one in node:
            close(one)
    if not isinstance(node, dict):
        return
    if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        node.setdefault("additionalProperties", False)
    for one in node.values():
        close(one)
