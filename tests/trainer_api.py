"""A stand-in for the Kubernetes API of a cluster with Kubeflow Trainer: it runs a TrainJob's nodes as processes here.

It knows the requests that the SDK makes, sets the variables that Trainer's controller sets, and nothing more.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import yaml
from kubernetes_server import JsonAnswers, kubernetes_server

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "deploy/kubernetes/components/multi-node/trainer.yaml"
CREATED = "2026-01-01T00:00:00Z"
NAMESPACE = "mine"  # as in a profile of Kubeflow: any name


class Cluster:
    """One namespace. `jobs` are the TrainJobs as they were posted, deleted ones included."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = next(
            found for found in yaml.safe_load_all(RUNTIME.read_text()) if found["kind"] == "TrainingRuntime"
        )
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, list[subprocess.Popen[bytes]]] = {}
        self.requests: list[str] = []

    def create(self, job: dict[str, Any]) -> dict[str, Any]:
        name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
        job["metadata"] |= {"creationTimestamp": CREATED, "namespace": NAMESPACE}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        nodes = trainer["numNodes"]
        known = {"PET_NNODES": nodes, "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, "PET_NPROC_PER_NODE": 7}
        command = [sys.executable if word == "python" else word for word in trainer["command"]]
        self.jobs[name], self.pods[name] = job, []
        for node in range(nodes):
            environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PET_NODE_RANK": str(node), "OMP_NUM_THREADS": "1"}
            environment |= {key: str(value) for key, value in known.items()}
            with self.log(name, node).open("wb") as log:
                pod = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            self.pods[name].append(pod)
        return job

    def log(self, name: str, node: int) -> Path:
        return self.folder / f"{name}-{node}.log"

    def read(self, name: str) -> dict[str, Any]:
        """The job with its status, as its nodes' processes make it."""
        ended = [pod.poll() for pod in self.pods[name]]
        if any(ended):
            self.stop(name)
        if any(ended) or all(status == 0 for status in ended):
            condition = {"type": "Failed" if any(ended) else "Complete", "status": "True", "reason": "", "message": "",
                         "lastTransitionTime": CREATED}  # fmt: skip
            return self.jobs[name] | {"status": {"conditions": [condition]}}
        return self.jobs[name]

    def stop(self, name: str) -> None:
        for pod in self.pods[name]:
            pod.terminate()
            pod.wait()

    def delete(self, name: str) -> dict[str, Any]:
        self.stop(name)
        del self.pods[name]
        return {"kind": "Status", "status": "Success"}

    def list_pods(self, selector: str) -> dict[str, Any]:
        found = re.search(r"jobset-name=([\w-]+)", selector)
        assert found
        return {"kind": "PodList", "apiVersion": "v1", "items": [
            {
                "metadata": {
                    "name": f"{found[1]}-{node}", "creationTimestamp": CREATED,
                    "labels": {
                        "jobset.sigs.k8s.io/replicatedjob-name": "node",
                        "batch.kubernetes.io/job-completion-index": str(node),
                    },
                },
                "spec": {"containers": [{"name": "node", "resources": {"limits": {"cpu": "1"}}}]},
                "status": {"phase": "Running" if pod.poll() is None else "Failed" if pod.poll() else "Succeeded"},
            }
            for node, pod in enumerate(self.pods[found[1]])
        ]}  # fmt: skip


class _Handler(JsonAnswers, BaseHTTPRequestHandler):  # named for ruff: so `do_GET` may be called that
    cluster: Cluster

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        last = path.rpartition("/")[2]
        self.cluster.requests.append(f"GET {path}")
        if "/trainingruntimes/" in path and last == self.cluster.runtime["metadata"]["name"]:
            self.answer(self.cluster.runtime)
        elif "/trainjobs/" in path and last in self.cluster.pods:
            self.answer(self.cluster.read(last))
        elif path.endswith("/pods"):
            self.answer(self.cluster.list_pods(query.replace("%3D", "=")))
        elif path.endswith("/log"):
            name, _, node = path.split("/")[-2].rpartition("-")
            self.send_response(200)
            self.end_headers()
            while "follow=True" in query and self.cluster.pods[name][int(node)].poll() is None:
                self.cluster.read(name)  # the controller at work: one node's end may be the other's
                time.sleep(0.05)
            self.wfile.write(self.cluster.log(name, int(node)).read_bytes())
        else:
            self.answer({"kind": "Status", "code": 404, "reason": "NotFound"}, 404)

    def do_POST(self) -> None:
        self.cluster.requests.append(f"POST {self.path}")
        self.answer(self.cluster.create(json.loads(self.rfile.read(int(self.headers["Content-Length"])))), 201)

    def do_DELETE(self) -> None:
        self.cluster.requests.append(f"DELETE {self.path}")
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(self.cluster.delete(self.path.rpartition("/")[2]))


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[Cluster, Path]]:
    """Serve one, and write the kubeconfig that leads to it; stop what still runs there."""
    stand_in = Cluster(folder)
    with kubernetes_server(_Handler, stand_in, folder, namespace=NAMESPACE) as kubeconfig:
        try:
            yield stand_in, kubeconfig
        finally:
            for name in stand_in.pods:
                stand_in.stop(name)
