"""Fixtures of the tests that use a registry, or the HTTP endpoint."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from openai import OpenAI
    from project import Project
    from real_stack import Stack
    from rollout_project import Here

    from vismem.serving.answering import Runtime


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty store; making one takes seconds, copying it none."""
    from vismem.config import RegistryConfig
    from vismem.registry.tracking import open_store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        open_store(RegistryConfig(tracking_uri=f"sqlite:///{path}"))
    return path


@pytest.fixture
def project(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> "Project":
    """A project with an empty SQLite store of its own."""
    from project import Project

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    return Project(tmp_path)


@pytest.fixture(params=[False, True], ids=["deployment", "kserve"])
def here(
    project: "Project", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator["Here"]:
    """Version 1 is released and served by two pods of a cluster."""
    from deployments_api import served
    from kubernetes.config import load_kube_config
    from rollout_project import Here

    found = Here(project, tmp_path, monkeypatch, kserve=request.param)
    with served(found.cluster, tmp_path) as kubeconfig:
        monkeypatch.setattr("vismem.rollout.load_config", lambda: load_kube_config(str(kubeconfig)))
        found.release(b"one", 66.0)
        assert found.roll_out() == "version 1 is served by all pods of 'triton': the canary gave its 1 golden answers"
        assert found.state == (["1", "1"], [], "1")
        yield found


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Stack"]:
    """PostgreSQL, an S3 server and MLflow."""
    from real_stack import running_stack

    with running_stack(tmp_path_factory.mktemp("stack") / "stack") as stack:
        yield stack


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that leads to no server."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_TRACKING")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture(scope="module")
def runtime(tiny_base: Path) -> "Runtime":
    """A runtime with torch; a module that needs another has its own."""
    import tiny_stages

    from vismem.generation.torch_executor import TorchExecutor
    from vismem.serving.answering import Runtime

    return Runtime(TorchExecutor(tiny_stages.eager_model(tiny_base)), rows=4)


@pytest.fixture(scope="module")
def url(runtime: "Runtime") -> Iterator[str]:
    """The HTTP endpoint over the module's runtime; its model is `tiny`."""
    from http_calls import served

    from vismem.serving.http import create_app

    with served(create_app(runtime, "tiny")) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> "OpenAI":
    """OpenAI's own client of it."""
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
