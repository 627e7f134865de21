"""When the alert on the rate of memories fires, by promtool, with which Prometheus tests rules."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import binom
from series import MONITORING

from vismem.config import InvocationConfig

ALERT = "VisMemMemoryRateChanged"
HOURS = 26
LIVE, EVALUATED = "vismem_memories_per_answer", "vismem_evaluation_memories_per_answer"


def labels(pod: str = "a", version: str = "7", kind: str = "short") -> str:
    return f'{{namespace="n",pod="{pod}",process="1",model="vismem",version="{version}",kind="{kind}"}}'


def answers(of: str, per_minute: float, memories: float) -> dict[str, str]:
    """Series of a process, minute by minute, that gives so many answers with so many memories each."""
    rates = {"count": per_minute, "sum": per_minute * memories}
    return {f"{LIVE}_{part}{of}": f"0+{rate:.4f}x{HOURS * 60}" for part, rate in rates.items()}


def evaluated(of: str, memories: float) -> dict[str, str]:
    return {f"{EVALUATED}{of}": f"{memories}+0x{HOURS * 60}"}


def promtool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """promtool's verdict, in a folder with the alerts as Prometheus reads them."""
    if (tool := shutil.which("promtool")) is None:
        pytest.skip("no promtool on this machine: `apt-get install prometheus`")
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    return subprocess.run([tool, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def judged(folder: Path, series: dict[str, str], fired: dict[str, str], at: str = f"{HOURS}h") -> str:
    """What promtool has against it that the alert has fired, then, for just these kinds with these distances."""
    expected = []
    for kind, distance in fired.items():
        names = {"severity": "info", "namespace": "n", "model": "vismem", "version": "7", "kind": kind}
        summary = f"vismem version 7 invokes {kind} memories more or less often than in its evaluation."
        description = (
            f"Over a day, in at least 1100 answers, their mean per answer is {distance} away from the evaluation's; "
            "0.05 plus half of the evaluation's is allowed. The questions, or the lengths that are asked for, are "
            "not those of the test split; docs/drift.md says what to do."
        )
        expected.append({"exp_labels": names, "exp_annotations": {"summary": summary, "description": description}})
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": at, "alertname": ALERT, "exp_alerts": expected}],
    }
    (folder / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "30m", "tests": [test]})
    )
    done = promtool(folder, "test", "rules", "test.yaml")
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_prometheus_takes_all_alerts(tmp_path: Path) -> None:
    done = promtool(tmp_path, "check", "rules", "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("live", "evaluation", "distance"), [(0.5, 0.2, "0.30"), (0.3, 1.0, "0.70"), (0.1, 0, "0.10")])
def test_it_fires_where_answers_invoke_more_or_less_than_in_the_evaluation(
    live: float, evaluation: float, distance: str, tmp_path: Path
) -> None:
    long = answers(labels(kind="long"), 1, 0.2) | evaluated(labels(kind="long"), 0.2)
    series = answers(labels(), 1, live) | evaluated(labels(), evaluation) | long
    assert judged(tmp_path, series, {"short": distance}) == ""
    assert judged(tmp_path, series, {}, at="19h") == "", "1100 answers, and then an hour"


SILENT = {
    "as in the evaluation": answers(labels(), 1, 0.2) | evaluated(labels(), 0.2),
    "half as often again": answers(labels(), 1, 0.3) | evaluated(labels(), 0.2),
    "less than 0.05 away": answers(labels(), 1, 0.05) | evaluated(labels(), 0.01),
    "a bundle that names no evaluation": answers(labels(), 1, 3),
    "few answers": answers(labels(), 0.3, 3) | evaluated(labels(), 0.2),
    "no answer": answers(labels(), 0, 0) | evaluated(labels(), 0.2),
    "another version's answers": answers(labels(version="6"), 1, 3) | evaluated(labels(), 0.2),
    "pods that differ, and together do not": answers(labels("a"), 1, 0.4) | answers(labels("b"), 1, 0)
    | evaluated(labels("a"), 0.2) | evaluated(labels("b"), 0.2),
}  # fmt: skip


@pytest.mark.parametrize("case", SILENT)
def test_it_is_silent(case: str, tmp_path: Path) -> None:
    assert judged(tmp_path, SILENT[case], {}) == ""


def test_chance_alone_fires_it_on_less_than_one_day_in_900() -> None:
    """Of independent answers, also where each invokes either nothing or the most that it may: nothing varies more."""
    rule = (MONITORING / "alerts.yaml").read_text().partition(ALERT)[2]
    found = re.search(r"> (\S+) \+ (\S+) \*.*?>= (\d+)", rule, re.DOTALL)
    assert found is not None
    fixed, share, n = map(float, found.groups())
    most = InvocationConfig().max_per_answer
    mean = np.linspace(0.005, most, 2000)
    limit, answers_with = fixed + share * mean, binom(n, mean / most)
    fires = answers_with.sf((mean + limit) * n / most) + answers_with.cdf(np.nextafter((mean - limit) * n / most, -1))
    assert 0 < fires.max() < 1 / 900


def test_the_answers_of_all_pods_count(tmp_path: Path) -> None:
    pods = [answers(labels(pod), 0.4, 0.5) | evaluated(labels(pod), 0.2) for pod in "ab"]
    assert judged(tmp_path, pods[0], {}) == ""
    assert judged(tmp_path, pods[0] | pods[1], {"short": "0.30"}) == ""
