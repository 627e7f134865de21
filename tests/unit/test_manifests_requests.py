"""The component `requests` of deploy/kubernetes: what logs requests, what compares them, and that none does without."""

from manifests import LARGE, named, overlays, pod_templates, render
from test_manifests_network import allowed

from vismem.cli import build_parser
from vismem.serving.request_log import FOLDER, IMAGES, MEGABYTES, SHARE

WITH = "7b"  # the install that has every component


def test_nothing_is_logged_unless_the_component_is_chosen_and_images_not_even_then() -> None:
    for overlay in ("single-gpu", "multi-node", "kubeflow-profile"):
        assert FOLDER not in str(render(overlay))
        assert "CronJob/drift" not in pod_templates(overlay)
    (triton,) = pod_templates(WITH)["Deployment/triton"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in triton["env"]}
    assert {FOLDER, SHARE, MEGABYTES} < set(variables)
    assert IMAGES not in variables


def test_the_job_reads_what_the_servers_write_on_one_volume_that_holds_the_bound() -> None:
    (triton,) = pod_templates(WITH)["Deployment/triton"]["spec"]["containers"]
    (job,) = pod_templates(WITH)["CronJob/drift"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in triton["env"]}
    for container, only_reads in (triton, False), (job, True):
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "requests"]
        assert variables[FOLDER].startswith(f"{mount['mountPath']}/")
        assert mount.get("readOnly", False) is only_reads
    claim = named(WITH, "PersistentVolumeClaim", "vismem-requests")["spec"]
    assert claim["accessModes"] == ["ReadWriteMany"]  # several nodes
    assert int(variables[MEGABYTES]) * 1e6 < int(claim["resources"]["requests"]["storage"].removesuffix("Gi")) * 2**30
    words = job["command"][-1].split()
    assert words[:2] == ["exec", "vismem"]
    assert build_parser().parse_args(words[2:5]).log.as_posix() == variables[FOLDER]


def test_the_job_may_ask_mlflow_and_no_server() -> None:
    assert allowed(WITH, "ingress", "from", "Deployment/mlflow", "CronJob/drift", "http")
    assert allowed(WITH, "egress", "to", "CronJob/drift", "Deployment/mlflow", "http")
    assert not allowed(WITH, "egress", "to", "CronJob/drift", "Deployment/triton", "grpc")


def test_a_difference_fails_the_job_at_once_and_other_faults_are_tried_again() -> None:
    job = named(WITH, "CronJob", "drift")["spec"]["jobTemplate"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [3]},
    }
    assert job["backoffLimit"] > 0


@overlays
def test_the_alert_about_drift_names_the_jobs_of_the_schedule(overlay: str) -> None:
    rules = [rule for manifest in render(overlay) if manifest["kind"] == "PrometheusRule" for rule in
             manifest["spec"]["groups"][0]["rules"] if rule["alert"] == "VisMemDrift"]  # fmt: skip
    assert len(rules) == (overlay in LARGE)
    assert all('job_name=~"drift-[0-9]+"' in rule["expr"] for rule in rules)
