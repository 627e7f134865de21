"""Brings the champion to the servers of a cluster, or the one before back: `python -m vismem.rollout`, a Job.

The champion is fetched to the servers' volume; one pod of it, the canary, is asked real questions; the servers follow,
or the ledger is rolled back. What a pod serves stands in its template, whenever it starts.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from kubernetes.client import ApiException, CustomObjectsApi  # type: ignore[import-untyped]
from kubernetes.config import load_config  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from vismem.canary import WrongAnswerError, question_canary
from vismem.config import Config
from vismem.errors import UserError
from vismem.provenance import MANIFEST as BUNDLE_MANIFEST
from vismem.provenance import sha256_file
from vismem.registry.release import NoEarlierError, rollback
from vismem.serving.command import run_command
from vismem.serving.publish import Published, is_champion, publish

SERVERS, CANARY = "triton", "triton-canary"  # Deployments, and the Services before their pods
PREDICTOR = f"{SERVERS}-predictor"  # with KServe: the Deployment that it makes of the InferenceService SERVERS
DEPLOYMENT = ("apps", "v1", "deployments")
INFERENCE_SERVICE = ("serving.kserve.io", "v1beta1", "inferenceservices")
# Of a pod template, what its pods serve: a release's folder, VERSION-CODE (of an earlier VisMem VERSION), and its hash.
VERSION, MANIFEST = "vismem/version", "vismem/manifest-sha256"
ROLLOUT = "vismem/rollout"  # of the canary's pod template: whose it is
PREVIOUS = "before."  # in front of VERSION and MANIFEST, of the servers' Deployment: what they served before
# Of the canary's Deployment: the manifest that all servers served last. KServe hands what theirs says to their pods.
SERVED = "vismem/served"
POLL = 2.0  # seconds
LOOKS = 5  # in a row that must show a missed deadline: for a moment after a change an earlier rollout's still shows
PATIENCE = 300.0  # seconds that the API, or MLflow, may be away or busy: its server may be restarting


class NotReadyError(UserError):
    """Pods did not become ready within Kubernetes' progress deadline."""


class Cluster:
    """What makes the pods of servers and canary, as one rollout sees and changes it: JSON as the API gives it."""

    def __init__(self, namespace: str, kserve: bool) -> None:
        load_config()  # the pod's own account; outside a cluster the kubeconfig's
        self.api, self.namespace, self.me = CustomObjectsApi(), namespace, uuid4().hex
        self.kserve = kserve

    def read(self, name: str) -> Any:
        """The object as it is now. UserError where this account may not, or it is not there."""
        return self._call("read", self.api.get_namespaced_custom_object, name)

    def change(self, name: str, body_of: Callable[[Any], dict[str, Any]]) -> None:
        """Patch an object with what `body_of` makes of it; again, where another changed it between.

        What `body_of` reads of others was so after the object was, and before the patch. UserError as in `read`, or
        where the change is refused.
        """
        changed = None
        while changed is None:
            seen = self.read(name)
            body = body_of(seen)
            body.setdefault("metadata", {})["resourceVersion"] = seen["metadata"]["resourceVersion"]
            changed = self._call("changed", self.api.patch_namespaced_custom_object, name, body)

    def _call(self, what: str, call: Callable[..., Any], name: str, *body: dict[str, Any]) -> Any:
        """The object that the API answers with; None at a conflict. Repeated while the API is away or busy."""
        group, version, plural = INFERENCE_SERVICE if self.kserve and name == SERVERS else DEPLOYMENT
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return call(group, version, self.namespace, plural, name, *body)
            except ApiException as error:
                if error.status == 409:
                    return None
                reason, passes = f"{error.status} {error.reason}", error.status == 429 or error.status >= 500
            except HTTPError as error:
                reason, passes = str(error), True
            if not passes or time.monotonic() > until:
                raise UserError(
                    f"{plural[:-1]} '{name}' in namespace '{self.namespace}' cannot be {what}: {reason}; "
                    "deploy/kubernetes/README.md says how it is installed"
                )
            time.sleep(POLL)

    def wait(self, name: str, check: Callable[[Any], object]) -> None:
        """Until all pods are of the present template and ready, as `kubectl rollout status` does.

        An InferenceService's own status does not say so: its observedGeneration is the Deployment's, and it stays ready
        while pods are replaced. UserError where Kubernetes' progress deadline has passed, or from `check`, which sees
        each state.
        """
        late = 0
        while True:
            seen = self.read(name)
            check(seen)
            pods = self.read(PREDICTOR) if "predictor" in seen["spec"] else seen
            status, wanted = pods.get("status", {}), pods["spec"]["replicas"]
            if pins_of(pods) == pins_of(seen) and status.get("observedGeneration", 0) >= pods["metadata"]["generation"]:
                reasons = [condition.get("reason") for condition in status.get("conditions", [])]
                late = late + 1 if "ProgressDeadlineExceeded" in reasons else 0
                if late == LOOKS:
                    raise NotReadyError(
                        f"the pods of deployment '{pods['metadata']['name']}' did not become ready in time"
                    )
                if {wanted} == {status.get(count, 0) for count in ("replicas", "updatedReplicas", "availableReplicas")}:
                    return
            time.sleep(POLL)

    def check_mine(self, canary: Any) -> None:
        """UserError where another rollout has taken the canary over, or somebody scaled it down."""
        if annotations(canary).get(ROLLOUT) != self.me:
            raise UserError("another rollout has taken over: this one ends, and has changed nothing since")
        if not canary["spec"]["replicas"]:
            raise UserError(f"deployment '{CANARY}' was scaled down meanwhile: nothing was rolled out; run this again")

    def stop_canary(self, whose: Callable[[dict[str, str]], bool] | None = None) -> None:
        """Scale the canary down if it is this rollout's, or by the annotations of its pods `whose`."""
        whose = whose or (lambda found: found.get(ROLLOUT) == self.me)
        self.change(CANARY, lambda seen: {"spec": {"replicas": 0}} if whose(annotations(seen)) else {})


def annotations(seen: Any) -> dict[str, str]:
    """Those of its pods."""
    pods = seen["spec"]["predictor"] if "predictor" in seen["spec"] else seen["spec"]["template"]["metadata"]
    return dict(pods.get("annotations") or {})


def pins_of(seen: Any) -> dict[str, str | None]:
    """What its pods are told to serve."""
    return {name: annotations(seen).get(name) for name in (VERSION, MANIFEST)}


def pod_annotations(seen: Any, values: Mapping[str, str | None]) -> dict[str, Any]:
    """The part of its spec that sets annotations of its pods; None removes one."""
    pods = {"annotations": values}
    return {"predictor": pods} if "predictor" in seen["spec"] else {"template": {"metadata": pods}}


def rollout(config: Config, folder: Path, namespace: str, canary: str, servers: str, kserve: bool) -> str:
    """Fetch the champion into `folder` and have all servers serve it; return a line that says so.

    `canary` and `servers`: gRPC addresses, host:port; `kserve`: whether an InferenceService makes the servers. Changes
    are made by compare-and-set, so that of two rollouts the later one ends the other, and one that was killed is
    finished by the next. UserError where the champion did not come up, or answered wrongly: the servers serve what they
    did. After a wrong answer the ledger is rolled back and blocks the version, unless the servers serve it by another
    VisMem's code; that a cluster has no room is no fault of a version. UserError, and no change, where pods of a
    release that all served before do not come up again.
    """
    release, cluster = publish(config, folder), Cluster(namespace, kserve)
    pins: dict[str, str | None] = {VERSION: release.repository.name, MANIFEST: release.manifest}
    seen = pins_of(cluster.read(SERVERS))
    if seen == pins:
        asked = "they were told so before"
        cluster.stop_canary(lambda found: found.get(VERSION) == pins[VERSION])  # left by a run that was killed
    else:
        claim = {**pins, ROLLOUT: cluster.me}
        cluster.change(CANARY, lambda seen: {"spec": {"replicas": 1, **pod_annotations(seen, claim)}})
        if not is_champion(config, release.version):  # another became it, and perhaps served, before the claim
            cluster.stop_canary()
            raise UserError(f"version {release.version} is champion no more: nothing was rolled out; run this again")
        cluster.wait(CANARY, cluster.check_mine)
        try:
            before = servers if seen[VERSION] else None
            asked = question_canary(config, release, folder / "questions.jsonl", canary, before)
        except UserError as error:
            cluster.check_mine(cluster.read(CANARY))  # else another's canary was asked
            if not isinstance(error, WrongAnswerError):
                raise
            cluster.stop_canary()
            if _serves_bundle(folder / "releases" / (seen[VERSION] or ""), release):
                raise UserError(
                    f"version {release.version}, which the servers serve, answers otherwise with this VisMem: {error}; "
                    "the servers serve on as they did, and the ledger stays"
                ) from None
            raise UserError(_refuse(config, release, str(error))) from None
        cluster.change(SERVERS, lambda seen: _next(cluster, pins, seen))
        cluster.stop_canary()
    try:
        cluster.wait(SERVERS, lambda seen: _check_pins(pins, seen))
    except NotReadyError as error:
        cluster.change(SERVERS, lambda seen: _back(cluster, pins, seen))
        raise UserError(
            f"{error}: the servers go back to the version before; mend the cluster and run this again, or "
            "`vismem models rollback`"
        ) from None
    cluster.change(CANARY, lambda _: _served(cluster, pins))
    return f"version {release.version} is served by all pods of '{SERVERS}': {asked}"


def _serves_bundle(served: Path, release: Published) -> bool:
    """Whether the servers' folder holds the release's bundle, by whatever code."""
    manifest = served / release.bundle.relative_to(release.repository) / BUNDLE_MANIFEST
    return manifest.is_file() and sha256_file(manifest) == sha256_file(release.bundle / BUNDLE_MANIFEST)


def _refuse(config: Config, release: Published, reason: str) -> str:
    """Roll the ledger back from a release, again while MLflow is away; the line that says why."""
    until, told = time.monotonic() + PATIENCE, ""
    while not told:
        try:
            told = rollback(config, left=release.version)
        except NoEarlierError as error:
            told = str(error)
        except UserError as error:
            if time.monotonic() > until:
                told = f"the ledger could NOT be changed, `vismem models rollback` does it: {error}"
            else:
                time.sleep(POLL)
    return f"version {release.version} is refused, the servers serve what they did: {reason}; {told}"


def _next(cluster: Cluster, pins: Mapping[str, str | None], servers: Any) -> dict[str, Any]:
    """The patch that makes the servers follow the canary. Its owner is read after them: see `Cluster.change`."""
    cluster.check_mine(cluster.read(CANARY))
    if pins_of(servers) == pins:  # changed by a request whose answer was lost: what was before is kept
        return {}
    kept = {PREVIOUS + name: value for name, value in pins_of(servers).items()}
    return {"metadata": {"annotations": kept}, "spec": pod_annotations(servers, pins)}


def _served(cluster: Cluster, pins: Mapping[str, str | None]) -> dict[str, Any]:
    """The patch of the canary's Deployment that says that all servers serve `pins`, while they are told so."""
    _check_pins(pins, cluster.read(SERVERS))
    return {"metadata": {"annotations": {SERVED: pins[MANIFEST]}}}


def _back(cluster: Cluster, pins: Mapping[str, str | None], servers: Any) -> dict[str, Any]:
    """The patch that makes the servers serve what they did before `pins`. UserError where all served `pins` already."""
    kept = servers["metadata"].get("annotations") or {}
    before = {name: kept.get(PREVIOUS + name) for name in pins}
    if pins_of(servers) == before:  # changed by a request whose answer was lost
        return {}
    _check_pins(pins, servers)
    if (cluster.read(CANARY)["metadata"].get("annotations") or {}).get(SERVED) == pins[MANIFEST]:
        raise UserError(
            f"the pods of '{SERVERS}' did not become ready in time, and all served release {pins[VERSION]} before: "
            "nothing was changed; mend their deployment or the cluster, and run this again"
        )
    return {"spec": pod_annotations(servers, before)}


def _check_pins(pins: Mapping[str, str | None], servers: Any) -> None:
    if pins_of(servers) != pins:
        raise UserError("another rollout has taken over: it has changed the servers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line; return 0 if all servers serve the champion, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m vismem.rollout", description=__doc__)
    parser.add_argument("--to", dest="folder", type=Path, required=True, help="the volume that the servers read")
    parser.add_argument("--namespace", required=True, help="where the servers are")
    parser.add_argument("--canary", default=f"{CANARY}:8001", help="gRPC host:port (default: %(default)s)")
    parser.add_argument("--servers", default=f"{SERVERS}:8001", help="gRPC host:port (default: %(default)s)")
    parser.add_argument("--kserve", action="store_true", help=f"the servers are those of InferenceService '{SERVERS}'")
    return run_command(parser, arguments, rollout)


if __name__ == "__main__":
    sys.exit(main())
