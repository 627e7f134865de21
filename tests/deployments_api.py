"""A stand-in for the Kubernetes API of a cluster with VisMem: its two Deployments, and the controller behind them.

Held to what Kubernetes publishes: a patch that names another resourceVersion than the present one is a conflict; maps
are merged and null removes a key; only a changed spec makes a new generation; a new pod template replaces pods within
maxSurge and maxUnavailable, or after all others where the strategy is Recreate; no progress until the deadline is a
condition of the Deployment; an account may do what its Role says. A pod is ready where the release that its environment
names is there, with the manifest that it names. Every request lets the controller make one step.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import RLock, Thread
from typing import Any

import yaml
from manifests import environment_of, named, namespace_of

from vismem.provenance import MANIFEST, sha256_file
from vismem.serving.exchange import Answer, DisconnectedError, Token
from vismem.serving.repository import MANIFEST_VARIABLE

INSTALL = "multi-node"
NAMESPACE = namespace_of(INSTALL)
PATCH = "application/strategic-merge-patch+json"
ANSWER = "two"
DEADLINE = 6  # steps of the controller without progress
Manifest = dict[str, Any]


class RefusedError(Exception):
    """What the API says no to: a status and a reason."""


class Cluster:
    """The namespace. `models` is the volume; pods of a version in `broken` never become ready."""

    def __init__(self, models: Path, replicas: int = 2) -> None:
        self.models, self.broken, self.deadline = models, set[str](), DEADLINE
        self.deployments = {name: deepcopy(named(INSTALL, "Deployment", name)) for name in ("triton", "triton-canary")}
        self.rules = named(INSTALL, "Role", "rollout")["rules"]
        self.pods: dict[str, list[Manifest]] = {name: [] for name in self.deployments}
        self.late = dict.fromkeys(self.deployments, 0)
        self.used: set[tuple[str, str]] = set()  # verb and name
        self.before_request: Callable[[str], None] = lambda _: None
        self.revision, self.lock = 0, RLock()
        for deployment in self.deployments.values():
            deployment["metadata"] |= {"generation": 1, "uid": "u", "resourceVersion": "0"}
            deployment["status"] = {}
        self.scale("triton", replicas)

    def scale(self, name: str, replicas: int) -> None:
        """As the autoscaler does. What is added while a rollout is under way may be of the old template."""
        with self.lock:
            deployment, pods = self.deployments[name], self.pods[name]
            old = [pod["template"] for pod in pods if pod["template"] != deployment["spec"]["template"]]
            pods.extend(self._start(template) for template in old[:1])
            self._merge(deployment, {"spec": {"replicas": replicas}})

    def versions(self, name: str = "triton") -> list[str]:
        """What the ready pods serve."""
        return [pod["release"].name for pod in self.pods[name] if pod["ready"]]

    def settle(self) -> None:
        for _ in range(20):
            self._step()

    def handle(self, verb: str, name: str, body: Manifest | None) -> Manifest:
        if not any(name in rule["resourceNames"] and verb in rule["verbs"] for rule in self.rules):
            raise RefusedError(403, "Forbidden")
        with self.lock:
            self.used.add((verb, name))
            self._step()
            deployment = self.deployments[name]
            if body is not None:
                now = deployment["metadata"]["resourceVersion"]
                if body.get("metadata", {}).pop("resourceVersion", now) != now:
                    raise RefusedError(409, "Conflict")
                self._merge(deployment, body)
            return deepcopy(deployment)

    def _merge(self, deployment: Manifest, body: Manifest) -> None:
        before = deepcopy(deployment)
        merge(deployment, body)
        if deployment["spec"] != before["spec"]:
            deployment["metadata"]["generation"] += 1
        if deployment["spec"]["template"] != before["spec"]["template"]:
            self.late[deployment["metadata"]["name"]] = 0
        self._touch(deployment, before)

    def _touch(self, deployment: Manifest, before: Manifest) -> None:
        if deployment != before:
            self.revision += 1
            deployment["metadata"]["resourceVersion"] = str(self.revision)

    def _step(self) -> None:
        with self.lock:
            for name in self.deployments:
                self._control(name)

    def _control(self, name: str) -> None:
        deployment, pods = self.deployments[name], self.pods[name]
        before = deepcopy(deployment)
        spec, template = deployment["spec"], deployment["spec"]["template"]
        strategy = spec["strategy"].get("rollingUpdate", {"maxSurge": 0, "maxUnavailable": spec["replicas"]})
        new, old = ([pod for pod in pods if (pod["template"] == template) is same] for same in (True, False))
        ready = sum(pod["ready"] for pod in pods)
        moved = False
        for pod in [*(pod for pod in old if not pod["ready"]), *(pod for pod in old if pod["ready"])]:
            if not pod["ready"] or ready > spec["replicas"] - strategy["maxUnavailable"]:
                pods.remove(pod)
                ready -= pod["ready"]
                moved = True
                break
        if len(new) > spec["replicas"]:
            pods.remove(new.pop())
        elif len(new) < spec["replicas"] and len(pods) < spec["replicas"] + strategy["maxSurge"]:
            pods.append(self._start(template))
            moved = True
        for pod in new:
            if not pod["ready"] and self._comes_up(pod):
                pod["ready"] = moved = True
        updated = [pod for pod in pods if pod["template"] == template]
        counts = {"replicas": len(pods), "updatedReplicas": len(updated)}
        counts["availableReplicas"] = sum(pod["ready"] for pod in pods)
        complete = len(updated) == len(pods) == counts["availableReplicas"] == spec["replicas"]
        self.late[name] = 0 if moved or complete else self.late[name] + 1
        reason = "ProgressDeadlineExceeded" if self.late[name] > self.deadline else "ReplicaSetUpdated"
        condition = {"type": "Progressing", "status": str(reason == "ReplicaSetUpdated"), "reason": reason}
        deployment["status"] = {
            "observedGeneration": deployment["metadata"]["generation"],
            "conditions": [condition],
            **{key: value for key, value in counts.items() if value},  # zeros are left out
        }
        self._touch(deployment, before)

    def _start(self, template: Manifest) -> Manifest:
        environment = environment_of(template["spec"]["containers"][0], template["metadata"]["annotations"])
        release = self.models / Path(environment["MODEL_REPOSITORY"]).relative_to("/models")
        return {
            "template": deepcopy(template),
            "release": release,
            "manifest": environment[MANIFEST_VARIABLE],
            "ready": False,
        }

    def _comes_up(self, pod: Manifest) -> bool:
        found = [sha256_file(file) for file in pod["release"].glob(f"vismem/{MANIFEST}")]
        return pod["release"].name not in self.broken and bool(found) and pod["manifest"] in ("", *found)


class Pods:
    """The clients of one cluster: a question goes to a ready pod behind the address."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.answers: dict[str, Any] = {}  # by version, where it is not ANSWER: a text, or an error
        self.meanwhile: Callable[[], object] = lambda: None  # at each question

    def client(self, address: str, model: str) -> "Pods":
        assert model == "vismem"
        self.name = address.removeprefix("grpc://").removesuffix(":8001")
        return self

    def ask(self, images: Any, question: str, max_new_tokens: int) -> Answer:
        self.meanwhile()
        ready = self.cluster.versions(self.name)
        if not ready:
            raise DisconnectedError("nobody")
        answer = self.answers.get(ready[0], ANSWER)
        if isinstance(answer, Exception):
            raise answer
        return Answer.of([Token(answer, "token"), Token("", "end")], {}, 0.1)

    def check_version(self, url: str, model: str, version: str) -> None:
        assert self.cluster.versions(url.removesuffix(":8001")) == [version]


def merge(into: Manifest, patch: Manifest) -> None:
    """A merge patch of maps; lists would be merged by rules that are not here."""
    for key, value in patch.items():
        assert not isinstance(value, list)
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        elif value is None:
            into.pop(key, None)
        else:
            into[key] = value


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def do_GET(self) -> None:
        self.respond("get", None)

    def do_PATCH(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Content-Type"] == PATCH
        self.respond("patch", json.loads(content))

    def respond(self, verb: str, body: Manifest | None) -> None:
        folder, _, name = self.path.partition("?")[0].rpartition("/")
        self.cluster.before_request(verb)
        try:
            assert folder == f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"
            status, found = 200, self.cluster.handle(verb, name, body)
        except RefusedError as error:
            status, reason = error.args
            found = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "reason": reason}
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(cluster: Cluster, folder: Path) -> Iterator[Path]:
    """Serve it, and write the kubeconfig that leads to it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"cluster": cluster}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    there = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "here", "clusters": [there],
              "contexts": [context], "users": [{"name": "me", "user": {}}]}  # fmt: skip
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    try:
        yield folder / "kubeconfig"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
