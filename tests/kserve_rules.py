"""What KServe makes of an InferenceService in the mode Standard, by the sources of 0.20 (aaac4e2).

predictor_custom.go (defaults), components/predictor.go, reconcilers/deployment/deployment_reconciler.go and
inference_service_status.go; the figures are those of config/configmap/inferenceservice.yaml.
"""

from copy import deepcopy
from typing import Any

CONTAINER = "kserve-container"
RESOURCES = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"cpu": "1", "memory": "2Gi"}}  # where one is not set
KEPT_BACK = {  # annotations that do not reach the pods
    "autoscaling.knative.dev/min-scale",
    "autoscaling.knative.dev/max-scale",
    "internal.serving.kserve.io/storage-initializer-sourceuri",
    "kubectl.kubernetes.io/last-applied-configuration",
    "modelFormat",
}
EXTENSIONS = ("labels", "annotations", "deploymentStrategy")  # of a predictor, beside the fields of a pod
Manifest = dict[str, Any]


def deployment_of(service: Manifest) -> Manifest:
    """The Deployment; the API's defaults are not in it."""
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"
    assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external", "replicas are its own"
    pod = deepcopy(service["spec"]["predictor"])
    labels, annotations, strategy = (pod.pop(name) for name in EXTENSIONS)
    name = f"{service['metadata']['name']}-predictor"
    app = {"app": f"isvc.{name}"}
    annotations = {**service["metadata"]["annotations"], **annotations}
    metadata = {
        "labels": {
            **service["metadata"]["labels"],
            **labels,
            "serving.kserve.io/inferenceservice": service["metadata"]["name"],
            "component": "predictor",
            **app,
        },
        "annotations": {key: value for key, value in annotations.items() if key not in KEPT_BACK},
    }
    (container,) = pod["containers"]
    container["name"] = CONTAINER
    container["env"].append({"name": "INFERENCE_SERVICE_NAME", "value": service["metadata"]["name"]})
    for kind, defaults in RESOURCES.items():
        container["resources"][kind] = {**defaults, **container["resources"].get(kind, {})}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": service["metadata"].get("namespace"), **metadata},
        "spec": {
            "selector": {"matchLabels": app},
            "strategy": strategy,
            "template": {"metadata": deepcopy(metadata), "spec": pod},
        },
    }


def status_of(deployment: Manifest) -> Manifest:
    """The InferenceService's: its generation is the Deployment's, and it is ready while enough pods are, new or old."""
    status, spec = deployment["status"], deployment["spec"]
    least = spec["replicas"] - spec["strategy"]["rollingUpdate"]["maxUnavailable"]
    available = status.get("availableReplicas", 0) >= least
    late = any(condition["reason"] == "ProgressDeadlineExceeded" for condition in status.get("conditions", []))
    ready = str(available and not late)
    return {
        "observedGeneration": status.get("observedGeneration", 0),
        "conditions": [{"type": kind, "status": ready} for kind in ("PredictorReady", "Ready")],
    }
