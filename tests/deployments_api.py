"""A stand-in for the Kubernetes API of a cluster with VisMem: its two Deployments, and the controllers behind them.

Held to what Kubernetes publishes: a patch that names another resourceVersion than the present one is a conflict; maps
are merged and null removes a key; only a changed spec makes a new generation; a new pod template replaces pods within
maxSurge and maxUnavailable, or after all others where the strategy is Recreate; no progress until the deadline is a
condition of the Deployment; an account may do what its Role says. A pod is ready where the release that its environment
names is there, with the manifest that it names. Every request lets the controller make one step.

With KServe the servers' Deployment is what kserve_rules.py says of their InferenceService, some steps late.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
from kserve_rules import deployment_of, status_of
from kubernetes.client import CustomObjectsApi
from kubernetes_server import JsonAnswers, kubernetes_server
from manifests import environment_of, named, namespace_of, servers

from vismem import rollout
from vismem.provenance import MANIFEST, sha256_file
from vismem.serving.exchange import Answer, DisconnectedError, Token
from vismem.serving.repository import MANIFEST_VARIABLE

INSTALL, WITH_KSERVE = "multi-node", "kserve"
NAMESPACE = namespace_of(INSTALL)
PATCH = "application/merge-patch+json"
ANSWER = "two"
DEADLINE = 6  # steps of the controller without progress
BEHIND = 8  # steps until KServe follows: more than a rollout makes requests between its change and its first look
DEPLOYMENTS, SERVICES = "apps/v1/deployments", "serving.kserve.io/v1beta1/inferenceservices"
Manifest = dict[str, Any]


class RefusedError(Exception):
    """What the API says no to: a status and a reason."""


class Cluster:
    """The namespace. `models` is the volume; pods of a version in `broken` never become ready.

    The servers' Deployment has the key "triton", whatever its name is.
    """

    def __init__(self, models: Path, replicas: int = 2, kserve: bool = False) -> None:
        self.models, self.broken, self.deadline = models, set[str](), DEADLINE
        install = WITH_KSERVE if kserve else INSTALL
        names = {"triton": servers(install), "triton-canary": "triton-canary"}
        self.deployments = {key: deepcopy(named(install, "Deployment", name)) for key, name in names.items()}
        self.service = deepcopy(named(install, "InferenceService", "triton")) if kserve else {}
        self.behind = 0
        self.rules = named(install, "Role", "rollout")["rules"]
        self.pods: dict[str, list[Manifest]] = {name: [] for name in self.deployments}
        self.late = dict.fromkeys(self.deployments, 0)
        self.used: set[tuple[str, str, str]] = set()  # group/version/resource, verb and name
        self.before_request: Callable[[str], None] = lambda _: None
        self.revision, self.lock = 0, RLock()
        for made in filter(None, (*self.deployments.values(), self.service)):
            made["metadata"] |= {"generation": 1, "uid": "u", "resourceVersion": "0"}
            made["status"] = {}
        self.scale("triton", replicas)

    def scale(self, name: str, replicas: int) -> None:
        """As the autoscaler does. What is added while a rollout is under way may be of the old template."""
        with self.lock:
            deployment, pods = self.deployments[name], self.pods[name]
            old = [pod["template"] for pod in pods if pod["template"] != deployment["spec"]["template"]]
            pods.extend(self._start(template) for template in old[:1])
            self._merge(name, deployment, {"spec": {"replicas": replicas}})

    def versions(self, name: str = "triton") -> list[str]:
        """What the ready pods serve."""
        return [version_of(pod) for pod in self.pods[name] if pod["ready"]]

    def settle(self) -> None:
        for _ in range(20):
            self._step()

    def handle(self, verb: str, resource: str, name: str, body: Manifest | None) -> Manifest:
        if not any(self._allows(rule, verb, resource, name) for rule in self.rules):
            raise RefusedError(403, "Forbidden")
        with self.lock:
            self.used.add((resource, verb, name))
            self._step()
            key, found = self._find(resource, name)
            if body is not None:
                now = found["metadata"]["resourceVersion"]
                if body.get("metadata", {}).pop("resourceVersion", now) != now:
                    raise RefusedError(409, "Conflict")
                self._merge(key, found, body)
            return deepcopy(found)

    @staticmethod
    def _allows(rule: Manifest, verb: str, resource: str, name: str) -> bool:
        group, _, plural = resource.split("/")
        return (
            group in rule["apiGroups"]
            and plural in rule["resources"]
            and name in rule["resourceNames"]
            and verb in rule["verbs"]
        )

    def _find(self, resource: str, name: str) -> tuple[str, Manifest]:
        if resource == SERVICES:
            return "service", self.service
        assert resource == DEPLOYMENTS
        return next((key, one) for key, one in self.deployments.items() if one["metadata"]["name"] == name)

    def _merge(self, key: str, into: Manifest, body: Manifest) -> None:
        before = deepcopy(into)
        merge(into, body)
        if into["spec"] != before["spec"]:
            into["metadata"]["generation"] += 1
        if key == "service":
            self.behind = BEHIND
        elif into["spec"]["template"] != before["spec"]["template"]:
            self.late[key] = 0
        self._touch(into, before)

    def _touch(self, changed: Manifest, before: Manifest) -> None:
        if changed != before:
            self.revision += 1
            changed["metadata"]["resourceVersion"] = str(self.revision)

    def _step(self) -> None:
        with self.lock:
            if self.service:
                self._follow()
            for name in self.deployments:
                self._control(name)

    def _follow(self) -> None:
        """KServe's controller: the status is that of the Deployment before it is changed."""
        self.behind -= 1
        if self.behind > 0:
            return
        deployment, before = self.deployments["triton"], deepcopy(self.service)
        self.service["status"] = status_of(deployment)
        self._touch(self.service, before)
        template = deployment_of(self.service)["spec"]["template"]
        if template != deployment["spec"]["template"]:
            old = deepcopy(deployment)
            deployment["spec"]["template"] = template
            deployment["metadata"]["generation"] += 1
            self.late["triton"] = 0
            self._touch(deployment, old)

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
        return version_of(pod) not in self.broken and bool(found) and pod["manifest"] in ("", *found)


def version_of(pod: Manifest) -> str:
    return str(pod["release"].name.partition("-")[0])


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


class _Handler(JsonAnswers, BaseHTTPRequestHandler):  # named for ruff: so `do_GET` may be called that
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
            place = f"/namespaces/{NAMESPACE}"
            assert folder.startswith("/apis/")
            assert place in folder
            status, found = 200, self.cluster.handle(verb, folder.removeprefix("/apis/").replace(place, ""), name, body)
        except RefusedError as error:
            status, reason = error.args
            found = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "reason": reason}
        self.answer(found, status)


def served(cluster: Cluster, folder: Path) -> AbstractContextManager[Path]:
    """Serve it; the kubeconfig that leads to it."""
    return kubernetes_server(_Handler, cluster, folder)


@contextmanager
def at_request(patch: pytest.MonkeyPatch, count: int, act: Callable[[], object]) -> Iterator[None]:
    """Let `act` happen before the request of that number that a job makes, in the job's own process."""
    left = [count]

    class Api(CustomObjectsApi):  # type: ignore[misc]
        def get_namespaced_custom_object(self, *given: Any) -> Any:
            return self.counted(super().get_namespaced_custom_object, *given)

        def patch_namespaced_custom_object(self, *given: Any) -> Any:
            return self.counted(super().patch_namespaced_custom_object, *given)

        def counted(self, call: Callable[..., Any], *given: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                act()
            return call(*given)

    with patch.context() as inner:
        inner.setattr(rollout, "CustomObjectsApi", Api)
        yield
