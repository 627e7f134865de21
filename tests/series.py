"""The series that deploy/kubernetes reads of a server, and those that it has: of the runtime and of Triton itself."""

import json
import re
from collections.abc import Iterator

import yaml
from manifests import KUBERNETES

from vismem.serving.metrics import Metrics

TRITON = {  # of Triton's own those that are used here
    "nv_inference_pending_request_count",
    "nv_inference_queue_duration_us",
    "nv_inference_request_failure",
    "nv_inference_request_success",
}
SHOWN = Metrics(int, int)
SHOWN.evaluated.labels("short")  # a bundle says it
RUNTIME = {  # deploy/triton/model.py shows each under its own name
    sample.name
    for family in SHOWN.registry.collect()
    for sample in family.samples
    if not sample.name.endswith("_created")
}
JOBS = {  # of kube-state-metrics
    "kube_job_failed",
    "kube_job_created",
    "kube_job_status_completion_time",
    "kube_deployment_created",
    "kube_deployment_status_replicas_available",
}
SERIES = TRITON | RUNTIME | JOBS
# the first two are Prometheus's, the last three are kube-state-metrics'
LABELS = {
    "namespace", "pod", "model", "version", "kind", "reason", "outcome", "le", "job_name", "condition", "deployment",
}  # fmt: skip
MONITORING = KUBERNETES / "components" / "monitoring"


def rule_queries() -> Iterator[str]:
    """The expressions of the alerts, and what the autoscaler's adapter asks, for one pod."""
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for rule in yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]:
        yield rule["seriesQuery"]
        yield rule["metricsQuery"].replace("<<.LabelMatchers>>", 'pod="a"').replace("<<.GroupBy>>", "pod")


def dashboard_queries() -> Iterator[str]:
    """The queries of the dashboard's panels."""
    board = json.loads((MONITORING / "dashboard.json").read_text())
    yield from (target["expr"] for panel in board["panels"] for target in panel["targets"])


def asked() -> set[str]:
    """The names of all series of the server that are read."""
    names = "|".join(sorted(SERIES - JOBS, key=len, reverse=True))
    return set(re.findall(rf"\b(?:{names})\b", "\n".join([*rule_queries(), *dashboard_queries()])))
