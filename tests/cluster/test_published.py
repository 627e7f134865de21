"""The model against what Kubeflow publishes of itself: pipelines, and the Argo workflows that they are compiled to.

They are read from a checkout of github.com/kubeflow/pipelines (2.17) that the variable KFP_CHECKOUT names.
"""

import json
import os
from pathlib import Path
from typing import Any

import kfp_argo as argo
import pytest
import yaml

CHECKOUT = Path(os.environ.get("KFP_CHECKOUT", "none"))
WORKFLOWS = sorted((CHECKOUT / "test_data" / "compiled-workflows").glob("*.yaml"))
PIPELINES = {path.name: path for path in (CHECKOUT / "test_data" / "sdk_compiled_pipelines").rglob("*.yaml")}
DUMMY = ("argostub/createpvc", "argostub/deletepvc")  # images of tasks for which there is no pod

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="KFP_CHECKOUT names no checkout of kubeflow/pipelines")


def read(path: Path) -> list[dict[str, Any]]:
    spec, *platform = yaml.safe_load_all(path.read_text())
    settings = platform[0]["platforms"]["kubernetes"] if platform else {}
    return [spec, settings.get("deploymentSpec", {}).get("executors", {})]


def pairs() -> list[tuple[Path, Path]]:
    return [(PIPELINES[path.name], path) for path in WORKFLOWS if path.name in PIPELINES]


@pytest.mark.parametrize(("pipeline", "workflow"), [pytest.param(*pair, id=pair[0].stem) for pair in pairs()])
def test_tasks_wait_for_each_other_and_are_tried_again_as_the_published_workflow_says(
    pipeline: Path, workflow: Path
) -> None:
    spec, settings = read(pipeline)
    templates = {found["name"]: found for found in yaml.safe_load(workflow.read_text())["spec"]["templates"]}
    for name, component in {"root": spec["root"], **spec.get("components", {})}.items():
        for task_name, task in component.get("dag", {}).get("tasks", {}).items():
            of = spec["components"][task["componentRef"]["name"]]
            if "parameterIterator" in task or "artifactIterator" in task:
                continue
            label = of.get("executorLabel")
            container = spec["deploymentSpec"]["executors"][label].get("container") if label else None
            if label and (container is None or container["image"] in DUMMY):
                continue
            group = f"exit-hook-{name}-{task_name}" if argo.is_exit(task) else name
            made = {found["name"]: found for found in templates[group]["dag"]["tasks"]}
            driver, executor = made[f"{task_name}-driver"], made[task_name]
            waits = [] if argo.is_exit(task) else argo.depends(task)
            assert driver.get("depends", "") == " && ".join(f"{before}.Succeeded" for before in waits)
            assert ("when" in executor) == ("condition" in task.get("triggerPolicy", {}))
            others = component["dag"]["tasks"].items()
            ends = [other for other, found in others if argo.is_exit(found) and task_name in argo.depends(found)]
            hooks = {"exit-hook-" + f"{name}-{end}" for end in ends}
            assert {hook["template"] for hook in executor.get("hooks", {}).values()} == hooks
            if container:
                own = settings.get(label, {})
                given = {found["name"]: found["value"] for found in executor["arguments"]["parameters"]}
                assert executor["template"] == argo.executor_template(task, own)
                driven = ("pod-spec-patch", "cached-decision")
                assert {key: value for key, value in given.items() if key not in driven} == argo.arguments(task, own)


def test_a_pod_s_template_is_the_published_one() -> None:
    seen = {}
    for path in WORKFLOWS:
        if path.name.startswith("mounted_cabundle"):  # what a cluster's administrator may add
            continue
        for template in yaml.safe_load(path.read_text())["spec"]["templates"]:
            if template["name"].endswith("system-container-impl"):
                seen[json.dumps(template, sort_keys=True)] = template
    assert len(seen) > 5
    for template in seen.values():
        ours = argo.pod_template("retryStrategy" in template)
        container = {key: value for key, value in ours["containers"][0].items() if key != "name"}
        assert {key: template["container"][key] for key in container} == container
        assert template["volumes"] == ours["volumes"]
        assert template["securityContext"] == ours["securityContext"]
        (launcher,), (theirs,) = ours["initContainers"], template["initContainers"]
        assert {**theirs, "image": launcher["image"]} == launcher  # theirs is of no release
        assert "retryPolicy" not in template.get("retryStrategy", {}), "Argo's default holds: OnFailure"
