"""The committed pipelines on a model of Kubeflow whose pods return what ours do."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from kfp import compiler
from kfp_model import Kubeflow, Pod

from pipelines.pipeline import make_pipeline
from vismem.kubeflow.cluster import load_cluster
from vismem.kubeflow.parameters import TASKS, code_fingerprint, configure


@pytest.fixture
def kubeflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubeflow:
    """A fresh one; `configure` is the library's own, and the gate promotes unless the test says "refused"."""
    monkeypatch.setattr("vismem.kubeflow.parameters.code_fingerprint", cache(code_fingerprint))

    def execute(pod: Pod) -> dict[str, Any]:
        if pod.task == "configure":
            given = (pod.inputs[name] for name in ("profile", "overrides"))
            page, gpus = str(tmp_path / "resolved"), int(pod.inputs["gpus"])
            return dict(zip(TASKS, configure(*given, page, pod.inputs["image"], gpus), strict=True))
        return {"Output": model.verdict} if pod.task == "promote" else {}

    model = Kubeflow(execute)
    model.verdict = "promoted"
    return model


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The pipeline, compiled with other settings of the cluster."""
    file = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"

    @cache
    def compile_once(shared_volume: bool, settings: str) -> str:
        made = make_pipeline(shared_volume=shared_volume, cluster=load_cluster(json.loads(settings)))
        compiler.Compiler().compile(made, str(file))
        return file.read_text()

    def compile_with(*, shared_volume: bool = False, **settings: Any) -> str:
        with ThreadPoolExecutor() as thread:  # kfp looks through the whole stack, and pytest's is deep
            return thread.submit(compile_once, shared_volume, json.dumps(settings)).result()

    return compile_with
