"""A project, the stand-in of its cluster, and the job that brings its champion to the servers."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from deployments_api import ANSWER, NAMESPACE, Cluster, Pods
from project import Project

from vismem import canary, rollout
from vismem.registry.champion import read_ledger


class Killed(BaseException):
    """The job's end at a request."""


def kill() -> None:
    raise Killed


class Here:
    """A project, its cluster, and the command that the job runs."""

    def __init__(self, project: Project, folder: Path, patch: pytest.MonkeyPatch, kserve: bool = False) -> None:
        self.project, self.patch = project, patch
        self.start: tuple[bytes, Any] | None = None
        golden = project.steps["export"] / "golden"
        golden.mkdir(parents=True)
        (golden / "1-1").write_bytes(b"png")
        asked = {"images": ["1-1"], "question": "how many?", "tokens": [1], "answer": ANSWER}
        (golden / "golden.json").write_text(json.dumps([asked]))
        self.cluster, self.kserve = Cluster(folder / "models", kserve=kserve), kserve
        self.pods = Pods(self.cluster)
        patch.setattr(canary, "own_client", lambda address, model: self.pods.client(address, model))
        patch.setattr(canary, "_check_version", lambda *given: self.pods.check_version(*given))
        patch.setattr(rollout, "POLL", 0)

    def release(self, weights: bytes, score: float) -> None:
        assert self.project.release(weights, score)["promoted"]

    def roll_out(self) -> str:
        """The job's line, or why it failed."""
        try:
            told = rollout.rollout(
                self.project.config, self.cluster.models, NAMESPACE, "triton-canary:8001", "triton:8001", self.kserve
            )
        except rollout.UserError as error:
            return f"failed: {error}"
        assert f"version {' '.join(set(self.cluster.versions()))} is served by all" in told
        return told

    def rewind(self) -> None:
        """Back to the moment of the first call: what the API, the pods and the registry were then."""
        database, cluster = self.project.artifacts.parent / "mlflow.db", self.cluster
        if not self.start:
            self.start = database.read_bytes(), deepcopy((cluster.deployments, cluster.service, cluster.pods))
        database.write_bytes(self.start[0])
        cluster.deployments, cluster.service, cluster.pods = deepcopy(self.start[1])

    @property
    def state(self) -> tuple[list[str], list[str], str | None]:
        """What all pods of the servers serve, what those of the canary, and the ledger's champion."""
        self.cluster.settle()
        return self.cluster.versions(), self.cluster.versions("triton-canary"), read_ledger(self.project.store).champion
