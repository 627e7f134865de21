"""A canary that is a real Triton, started as its pod's template says, is asked over gRPC; the API is a stand-in."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deployments_api import NAMESPACE, Cluster, Manifest, served
from kubernetes.config import load_kube_config
from project import Project

from vismem import rollout
from vismem.registry.champion import read_ledger
from vismem.services import free_ports
from vismem.serving.repository import MANIFEST_VARIABLE


class ClusterWithTriton(Cluster):
    """Its canary is a process; the servers' pods are those of the stand-in."""

    def __init__(self, models: Path, folder: Path) -> None:
        self.folder, self.process = folder, None
        self.ports = free_ports(dict.fromkeys(("grpc", "http", "metrics"), 0))
        super().__init__(models)
        self.deadline = math.inf  # a server takes seconds, a step of the stand-in none

    def _comes_up(self, pod: Manifest) -> bool:
        if not any(pod is one for one in self.pods["triton-canary"]):
            return super()._comes_up(pod)
        if "log" not in pod:
            pod["log"] = self.folder / f"canary-{pod['release'].name}"
            command = [sys.executable, "-m", "vismem.cli", "serve", f"--repository={pod['release']}"]
            command += [f"--{name}-port={port}" for name, port in self.ports.items()]
            with pod["log"].open("wb") as log:
                environment = os.environ | {MANIFEST_VARIABLE: pod["manifest"]}
                self.process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.folder
                )
        assert self.process.poll() is None, pod["log"].read_text()
        return "serving vismem on" in pod["log"].read_text()

    def _control(self, name: str) -> None:
        super()._control(name)
        if name == "triton-canary" and self.process and not self.pods[name]:
            self.stop()

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterWithTriton]:
    monkeypatch.setattr(rollout, "POLL", 0.2)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = ClusterWithTriton(tmp_path / "models", tmp_path)
    with served(found, tmp_path) as kubeconfig:
        monkeypatch.setattr(rollout, "load_config", lambda: load_kube_config(str(kubeconfig)))
        yield found
    found.stop()


def test_a_real_triton_is_the_canary_of_a_version_that_is_served_and_of_one_that_is_refused(
    cluster: ClusterWithTriton, inputs: dict[str, Path], tmp_path: Path
) -> None:
    """The second version's bundle says that it had answered otherwise where it was exported."""
    project = Project(tmp_path)
    bundle = shutil.copytree(inputs["export"], project.steps["export"])
    weights = (bundle / "vismem" / "memory.safetensors").read_bytes()

    def roll_out() -> Any:
        url = f"127.0.0.1:{cluster.ports['grpc']}"
        return rollout.rollout(project.config, cluster.models, NAMESPACE, url, url, kserve=False)

    assert project.release(weights, 66.0)["promoted"]
    golden = json.loads((bundle / "golden" / "golden.json").read_text())
    assert any("⟨" in asked["answer"] for asked in golden), "answers with a memory"
    assert (
        roll_out() == f"version 1 is served by all pods of 'triton': the canary gave its {len(golden)} golden answers"
    )
    cluster.settle()
    assert (cluster.versions(), cluster.process) == (["1", "1"], None)

    golden[-1]["answer"] += "!"
    (bundle / "golden" / "golden.json").write_text(json.dumps(golden))
    assert project.release(weights, 68.0)["promoted"]
    with pytest.raises(rollout.UserError, match=r"version 2 is refused.* instead of .*version 1 is champion again"):
        roll_out()
    cluster.settle()
    assert (cluster.versions(), cluster.process) == (["1", "1"], None)
    assert read_ledger(project.store).champion == "1"
