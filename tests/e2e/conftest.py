"""Running tritonservers for the tests that only ask them, of a stand-in and of a real bundle; a project; a browser."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny
import torch
from playwright.sync_api import Browser, sync_playwright
from stand_in import make_repository

from vismem.config import parse_config
from vismem.export.onnx import write_graphs
from vismem.provenance import write_manifest
from vismem.records import Release
from vismem.serving.answering import Runtime
from vismem.serving.deploy import deploy
from vismem.serving.environment import DEFAULT_PYTHON, VARIABLE
from vismem.serving.golden import write_golden
from vismem.serving.server import TritonServer, triton_server

ROOT = Path(__file__).parents[2]
COPIED = ("vismem", "assets/tiny-vlm", "deploy/profiles", "deploy/triton", ".dvc/config", ".dvcignore", "dvc.yaml")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    if not DEFAULT_PYTHON.exists() and VARIABLE not in os.environ:
        pytest.fail(f"{DEFAULT_PYTHON} is missing: run `make serving`")
    folder = tmp_path_factory.mktemp("triton")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # of this server alone
            patch.setenv("VISMEM_WORKERS", "2")  # so that two answers keep it busy
            running = stack.enter_context(triton_server(make_repository(folder), log=folder / "server.log"))
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
    with contextlib.closing(Runtime.open(bundle)) as runtime:
        write_golden(runtime, ((sample.images, sample.question) for sample in tiny.samples()), bundle)
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


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what a user has cloned, with both environments."""
    for name in (*COPIED, "params.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    serving = Path(os.environ.get(VARIABLE, DEFAULT_PYTHON))
    if not serving.exists():
        pytest.fail(f"{serving} is missing: run `make serving`")
    _environment(tmp_path / ".venv")
    (tmp_path / ".venv-serving").symlink_to(serving.parents[1])
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path.parent / "site"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path.parent / "global"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def _environment(folder: Path) -> None:
    """A second face of this environment, whose `vismem` has it for its own: it prints paths of the copy."""
    (folder / "bin").mkdir(parents=True)
    for file in Path(sys.prefix).iterdir():
        if file.name != "bin":
            (folder / file.name).symlink_to(file)
    for file in Path(sys.prefix, "bin").iterdir():
        (folder / "bin" / file.name).symlink_to(file)
    script = folder / "bin" / "vismem"
    lines = script.read_text().splitlines(keepends=True)
    script.unlink()
    script.write_text(f"#!{folder / 'bin' / 'python'}\n" + "".join(lines[1:]))
    script.chmod(0o755)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium`")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)
