"""The wheel: all of the library and what comes with it, enough to work where there is no repository."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from vismem.config import load_config
from vismem.kubeflow.parameters import code_fingerprint
from vismem.params_file import render_params

ROOT = Path(__file__).parents[2]
BESIDE = ("assets", "deploy/profiles", "deploy/triton", "dvc.yaml", "examples/images", "examples/questions.jsonl")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(*places: Path) -> set[str]:
    found = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def elsewhere(installed: Path, folder: Path, *arguments: str) -> str:
    """The output of a Python that sees the wheel and the packages that it needs, but not the repository.

    -S: site-packages are on the path, and the file in them that leads to this checkout is not read.
    """
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    return run(sys.executable, "-S", *arguments, cwd=folder, PYTHONPATH=path)


def test_the_wheel_holds_the_library_and_what_comes_with_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    beside = files(*(ROOT / place for place in BESIDE))
    assert names == files(ROOT / "vismem") | {f"vismem/shipped/{name}" for name in beside}
    assert "vismem/py.typed" in names


def test_parameters_and_profiles_are_read_where_there_is_no_repository(installed: Path, tmp_path: Path) -> None:
    expected = render_params(load_config(ROOT / "params.yaml", "smoke"))
    assert elsewhere(installed, tmp_path, "-m", "vismem.cli", "params", "--profile", "smoke") == expected
    assert list(tmp_path.iterdir()) == []


def test_what_comes_with_the_library_is_found_where_there_is_no_repository(installed: Path, tmp_path: Path) -> None:
    program = (
        "import json\n"
        "from vismem.config import Config\n"
        "from vismem.kubeflow.parameters import code_fingerprint\n"
        "from vismem.serving.repository import LIBRARY, MODEL_SOURCE\n"
        "places = [str(place) for place in (Config().base.folder(), MODEL_SOURCE, LIBRARY) if place.exists()]\n"
        "print(json.dumps([*places, code_fingerprint('deploy')]))\n"
    )
    *places, fingerprint = json.loads(elsewhere(installed, tmp_path, "-c", program))
    assert [str(Path(place).relative_to(installed)) for place in places] == [
        "vismem/shipped/assets/tiny-vlm",
        "vismem/shipped/deploy/triton/model.py",
        "vismem",
    ]
    assert fingerprint == code_fingerprint("deploy")


def test_a_question_is_answered_where_there_is_no_repository(installed: Path, tmp_path: Path) -> None:
    picture = next(installed.glob("vismem/shipped/examples/images/*"))
    question = "what colour is the shape at the top left?"
    said = elsewhere(installed, tmp_path, "-m", "vismem.cli", "ask", "--image", str(picture), question)
    assert "answer: " in re.sub(r"⟨(short|long)⟩", "", said)
