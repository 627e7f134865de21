"""Running tritonservers for the tests that only ask them: one with a stand-in, one with a real bundle."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from stand_in import make_repository

from vismem.config import parse_config
from vismem.export.onnx import write_graphs
from vismem.provenance import write_manifest
from vismem.records import Release
from vismem.serving.answering import Runtime
from vismem.serving.deploy import deploy
from vismem.serving.environment import DEFAULT_PYTHON, VARIABLE
from vismem.serving.server import TritonServer, triton_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    if not DEFAULT_PYTHON.exists() and VARIABLE not in os.environ:
        pytest.fail(f"{DEFAULT_PYTHON} is missing: run `make serving`")
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISMEM_WORKERS", "2")  # so that two answers keep it busy
        with triton_server(make_repository(folder), log=folder / "server.log") as running:
            yield running


@pytest.fixture(scope="session")
def inputs(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What deploy reads: the bundle of a random model that invokes now and then, a refusal, test questions."""
    root = tmp_path_factory.mktemp("steps")
    model = tiny.vismem(tiny_base)
    with torch.no_grad():
        model.tokens.head.mul_(3)
    bundle = root / "export"
    model.save_pretrained(bundle / "vismem")
    model.backbone.processor.save_pretrained(bundle / "processor")
    write_graphs(model, bundle / "onnx", 18)
    write_manifest(bundle)
    refused = {"promoted": False, "reasons": ("random weights",)}
    Release(name="vismem", version="2", model_id="m-1", previous=None, **refused).write(root / "promote")
    return {"export": bundle, "promote": root / "promote", "validate": tiny_data}


@pytest.fixture(scope="session")
def deployed(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "deploy.partial"
    out.mkdir()
    deploy(parse_config({}), inputs, out)
    return out.rename(out.with_name("deploy"))


@pytest.fixture(scope="session")
def bundle_server(deployed: Path) -> Iterator[TritonServer]:
    with triton_server(deployed / "model_repository", log=deployed.parent / "log") as running:
        yield running


@pytest.fixture(scope="session")
def runtime(inputs: dict[str, Path]) -> Runtime:
    return Runtime.open(inputs["export"])
