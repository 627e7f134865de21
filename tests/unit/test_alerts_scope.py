"""Whose servers and rollouts the alerts are about: VisMem's, whatever its model is called, and no other team's."""

from pathlib import Path

import pytest
import yaml
from series import MONITORING
from test_alerts import promtool

CANARY = {'kube_deployment_created{namespace="n",deployment="triton-canary"}': "0x120"}
AVAILABLE = 'kube_deployment_status_replicas_available{namespace="n",deployment="triton"}'
MLFLOW = 'kube_deployment_status_replicas_available{namespace="n",deployment="mlflow"}'
SCRAPED = 'nv_inference_request_success{namespace="n",pod="triton-a",model="ours"}'
OTHERS = {
    'kube_deployment_status_replicas_available{namespace="other",deployment="triton"}': "0x120",
    'kube_deployment_status_replicas_available{namespace="other",deployment="mlflow"}': "0x120",
    'nv_inference_request_success{namespace="other",pod="triton-b",model="vismem"}': "5x120",
    'kube_job_failed{namespace="other",job_name="rollout-1",condition="true"}': "1x120",
    'kube_job_created{namespace="other",job_name="rollout-1"}': "0x120",
}
FAILED = '{namespace="n",job_name="rollout-1"}'
JOB = {
    'kube_job_failed{namespace="n",job_name="rollout-1",condition="true"}': "1x120",
    'kube_job_created{namespace="n",job_name="rollout-1"}': "0x120",
}


def succeeded(namespace: str, created: int) -> dict[str, str]:
    """Series of a rollout that succeeded, made so many seconds after the one that failed."""
    job = f'{{namespace="{namespace}",job_name="rollout-2"}}'
    return {f"kube_job_created{job}": f"{created}x120", f"kube_job_status_completion_time{job}": f"{created + 60}x120"}


CASES = {
    "no pod is ready": ("VisMemNotServed", {AVAILABLE: "0x120", SCRAPED: "5x120"}, '{namespace="n"}'),
    "none is scraped": ("VisMemNotServed", {AVAILABLE: "2x120"}, '{namespace="n"}'),
    "served": ("VisMemNotServed", {AVAILABLE: "2x120", SCRAPED: "5x120"}, ""),
    "no MLflow": ("VisMemMlflowDown", {MLFLOW: "0x120"}, '{namespace="n"}'),
    "MLflow": ("VisMemMlflowDown", {MLFLOW: "1x120"}, ""),
    "no token": ("VisMemModelDead", {SCRAPED: "5x120"}, '{namespace="n",pod="triton-a"}'),
    "tokens": ("VisMemModelDead", {SCRAPED: "5x120",
               'vismem_tokens_total{namespace="n",pod="triton-a"}': "0+1x120"}, ""),
    "a failed rollout": ("VisMemRolloutFailed", JOB, FAILED),
    "another's failed rollout": ("VisMemRolloutFailed", {}, ""),
    "failed, then succeeded": ("VisMemRolloutFailed", JOB | succeeded("n", 600), ""),
    "failed after one that succeeded": ("VisMemRolloutFailed", JOB | succeeded("n", -600), FAILED),
    "failed, then another's succeeded": ("VisMemRolloutFailed", JOB | succeeded("other", 600), FAILED),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_alert_is_about_vismem_s_own_namespace(case: str, tmp_path: Path) -> None:
    alert, series, fired = CASES[case]
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]
    (rule,) = [rule for rule in group["rules"] if rule["alert"] == alert]
    given = [{"series": name, "values": values} for name, values in (CANARY | OTHERS | series).items()]
    labels = f"count by (namespace, pod, job_name) ({rule['expr']})"
    expected = [{"labels": fired, "value": 1}] if fired else []
    asked = [{"expr": labels, "eval_time": "1h", "exp_samples": expected}]
    tests = [{"interval": "1m", "input_series": given, "promql_expr_test": asked}]
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": tests}))
    done = promtool(tmp_path, "test", "rules", "test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
