"""Kubeflow's compiler to Argo, as far as it decides about a task's pod: what it waits for, tries, labels, template.

Rules: kubeflow/pipelines 2.17, backend/src/v2/compiler/argocompiler; for tries argo-workflows 4, workflow/controller.
"""

import json
from copy import deepcopy
from typing import Any

Values = dict[str, Any]

SCRATCH = {
    "gcs": "/gcs",
    "s3": "/s3",
    "minio": "/minio",
    "dot-local": "/.local",
    "dot-cache": "/.cache",
    "dot-config": "/.config",
}
HARDENED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
LAUNCHER_MOUNT = {"mountPath": "/kfp-launcher", "name": "kfp-launcher"}
EXIT = "ALL_UPSTREAM_TASKS_COMPLETED"


def is_exit(task: Values) -> bool:
    """Whether it runs however the tasks that it depends on ended."""
    return bool(task.get("triggerPolicy", {}).get("strategy") == EXIT)


def depends(task: Values) -> list[str]:
    """The tasks of its group that must have succeeded: those that are named, and the producers of its inputs."""
    ports = task.get("inputs", {})
    named = [port.get("taskOutputParameter") for port in ports.get("parameters", {}).values()]
    named += [port.get("taskOutputArtifact") for port in ports.get("artifacts", {}).values()]
    return sorted({*task.get("dependentTasks", []), *(source["producerTask"] for source in named if source)})


def executor_template(task: Values, settings: Values) -> str:
    """The name of the template that its pod is made of; tasks of the same name share one."""
    name = "system-container-executor"
    if "retryPolicy" in task:
        name = f"retry-{name}"
    if metadata := settings.get("podMetadata"):
        name = f"metadata-{len(metadata.get('annotations', {}))}-{len(metadata.get('labels', {}))}-{name}"
    return name


def seconds(duration: str) -> int:
    """Of a protobuf duration, such as 30s; fractions are lost."""
    return int(float(duration.removesuffix("s")))


def arguments(task: Values, settings: Values) -> dict[str, str]:
    """What the template is given, besides the driver's outputs: labels, annotations, tries."""
    found = {}
    for kind in ("annotation", "label"):
        pairs = sorted(settings.get("podMetadata", {}).get(f"{kind}s", {}).items())
        for number, (key, value) in enumerate(pairs, start=1):
            suffix = f"-{number}" if len(pairs) > 1 else ""
            found |= {f"pod-metadata-{kind}-key{suffix}": key, f"pod-metadata-{kind}-val{suffix}": value}
    return found | retries(task)


def retries(task: Values) -> dict[str, str]:
    """How often it is tried, and when; empty: once."""
    found: dict[str, str] = {}
    if (policy := task.get("retryPolicy")) is not None:
        found["retry-max-count"] = str(policy.get("maxRetryCount", 0))
        found["retry-backoff-factor"] = f"{policy.get('backoffFactor', 0):g}"
        for key, name in (("backoffDuration", "duration"), ("backoffMaxDuration", "max-duration")):
            if key in policy:
                found[f"retry-backoff-{name}"] = str(seconds(policy[key]))
    return found


def pod_template(retried: bool) -> Values:
    """The spec of a task's pod before the driver's patch, without what Argo's controller adds (its executor)."""
    pod_field = {"KFP_POD_NAME": "metadata.name", "KFP_POD_UID": "metadata.uid"}
    env = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in pod_field.items()]
    mounts = [LAUNCHER_MOUNT, *({"mountPath": path, "name": f"{name}-scratch"} for name, path in SCRATCH.items())]
    main = {
        "name": "main",
        "env": [*env, *([{"name": "KFP_RETRY_INDEX", "value": "{{retries}}"}] if retried else [])],
        "envFrom": [{"configMapRef": {"name": "metadata-grpc-configmap", "optional": True}}],
        "securityContext": HARDENED,
        "volumeMounts": mounts,
    }
    launcher = {
        "name": "kfp-launcher",
        "image": "ghcr.io/kubeflow/kfp-launcher:2.17.0",
        "command": ["launcher-v2"],
        "args": ["--copy", "/kfp-launcher/launch"],
        "resources": {"limits": {"cpu": "500m", "memory": "256Mi"}, "requests": {"cpu": "100m"}},
        "securityContext": HARDENED | {"runAsNonRoot": True},
        "volumeMounts": [LAUNCHER_MOUNT],
    }
    return deepcopy(
        {
            "serviceAccountName": "pipeline-runner",
            "restartPolicy": "Never",
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
            "volumes": [{"name": mount["name"], "emptyDir": {}} for mount in mounts],
            "initContainers": [launcher],
            "containers": [main],
        }
    )


def filled_in(pod: Values, number: int) -> Values:
    """The pod as Argo's controller posts it for a task's try of that number, from 1."""
    filled: Values = json.loads(json.dumps(pod).replace("{{retries}}", str(number - 1)))
    return filled


def tried_again(given: dict[str, str], phase: str, tries: int, elapsed: float) -> bool:
    """Whether Argo starts another pod after `tries` of them, the last of which ended in `phase`.

    `given`: the task's `retries`; `elapsed`: seconds since the first one started. Kubeflow names no retry policy, and
    Argo's own is OnFailure: "Failed" is a pod that ended badly, was evicted or deleted while Argo's finalizer held it;
    "Error" is one that could not start or vanished.
    """
    if not given or phase != "Failed" or tries > int(given["retry-max-count"]):
        return False
    waits = int(given["retry-backoff-duration"]) * float(given["retry-backoff-factor"]) ** (tries - 1)
    return elapsed + waits <= int(given["retry-backoff-max-duration"])
