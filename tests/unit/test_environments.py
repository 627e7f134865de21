"""The Python environments: locks that hold what the project asks for, and the script that installs them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "environments"
LOCKS = ("bootstrap", "build", "dev", "serve", "torch-cpu", "torch-cuda", "train", "triton")
IN_TRAIN = ("pipeline", "export", "kubeflow", "signing")  # the extras that vismem-train holds

# A Python that says its version and has a configured pip; a uv that writes down its arguments and what pip handed on,
# and fails where FAIL names a part of its arguments.
PYTHON = """#!/bin/sh
case "$*" in *version_info*) echo %s ;; *"config list"*) cat "$(dirname "$0")/pip.conf" ;; esac
"""
UV = """#!/bin/sh
echo "uv $*" >> "$CALLS"
env | grep -E '^(UV_|SSL_CERT_FILE)' >> "$CALLS"
case "$1 $*" in
    "venv "*) mkdir -p "$5/bin"; cp "$BIN/pip.conf" "$5/bin"; cp "$BIN/python3" "$5/bin/python" ;;
    *"${FAIL:-nothing}"*) echo "error: Failed to fetch"; echo "  cause: ${CAUSE:-dns error}"; exit 1 ;;
esac
"""


def locked(name: str) -> dict[str, Version]:
    lines = (FOLDER / f"{name}.lock").read_text().splitlines()
    pins = [line.removesuffix("\\").strip().split("==") for line in lines if re.match("[a-z]", line)]
    return {canonicalize_name(package): Version(version) for package, version in pins}


def requirements(lines: Iterable[str]) -> Iterator[Requirement]:
    return (Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip())


def assert_fits(wishes: Iterable[str], have: dict[str, Version]) -> None:
    for wish in requirements(wishes):
        version = have.get(canonicalize_name(wish.name))
        assert version is not None, f"{wish} is in no lock: `make locks`"
        assert wish.specifier.contains(Version(version.public)), f"{wish}, but {version} is locked: `make locks`"


# --- the locks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torch", ["torch-cpu", "torch-cuda"])
def test_the_locks_hold_what_pyproject_asks_for_and_the_training_image_what_it_needs(torch: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, train = project["optional-dependencies"], locked("train") | locked(torch)
    assert_fits([*project["dependencies"], *(line for extra in IN_TRAIN for line in extras[extra])], train)
    assert_fits((line for lines in extras.values() for line in lines), train | locked("dev"))
    assert not set(train) & set(locked("dev"))


def test_the_serving_locks_hold_what_their_requirements_ask_for_in_the_same_versions() -> None:
    container, wheel = ((ROOT / "deploy/triton" / name).read_text() for name in ("container.txt", "requirements.txt"))
    assert "-r container.txt\n" in wheel
    assert_fits(container.splitlines(), locked("triton"))
    assert_fits(wheel.replace("-r container.txt\n", container).splitlines(), locked("serve"))
    assert locked("triton").items() <= locked("serve").items()
    assert not {"torch", "transformers"} & set(locked("serve"))


def test_a_serving_container_holds_every_package_that_its_command_and_its_probe_import() -> None:
    """Not those of the model's own library, which tests/e2e imports in a serving environment."""
    program = "import json, sys, vismem.cli, vismem.serving.supervise, vismem.serving.probe, tritonclient.grpc.aio; "
    program += "print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    known, lock = packages_distributions(), set(locked("triton"))
    imported = {name for name in json.loads(done.stdout) if name in known and not name.startswith("_")}
    missing = {name for name in imported if not lock & {canonicalize_name(package) for package in known[name]}}
    assert {"shtab", "httpx2", "tritonclient"} <= imported
    assert missing == {"vismem"}


def test_the_training_lock_leaves_torch_to_the_chosen_build() -> None:
    cpu, cuda = locked("torch-cpu"), locked("torch-cuda")
    assert cpu["torch"].public == str(cuda["torch"])
    assert set(cpu) == {"torch"}
    assert not set(cuda) & set(locked("train") | locked("dev"))


def test_what_builds_is_locked_in_the_version_that_is_locked_elsewhere() -> None:
    build, others = locked("build"), locked("train") | locked("dev")
    assert {"hatchling", "setuptools"} <= set(build)
    assert build == {name: others[name] for name in build}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_hashes_and_no_place(lock: str) -> None:
    text = (FOLDER / f"{lock}.lock").read_text()
    packages = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert packages
    assert [package.split()[0] for package in packages if "--hash=sha256:" not in package] == []
    assert "://" not in text


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A folder of programs that comes first on the PATH: Python 3.11, uv, no GPU."""
    shutil.copytree(FOLDER, tmp_path / "deploy" / "environments")
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {"python3": PYTHON % "3.11", "uv": UV, "nvidia-smi": "#!/bin/sh\nexit 9\n", "pip.conf": ""}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def setup(fakes: Path, environment: str = ".venv", **variables: str) -> tuple[int, list[str], list[str]]:
    """The script's status, what it said, and what it called uv with."""
    calls = fakes.parent / "calls"
    known = {"PATH": f"{fakes}:/usr/bin:/bin", "BIN": str(fakes), "CALLS": str(calls)}
    script = fakes.parent / "deploy" / "environments" / "setup.sh"
    done = subprocess.run(
        ["sh", script, environment], env={**known, **variables}, capture_output=True, text=True, check=False
    )
    said = (done.stdout + done.stderr).splitlines()
    return done.returncode, said, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(("version", "found"), [("3.10", "is 3.10"), ("3.13", "is 3.13"), ("", "is not there")])
def test_another_python_is_refused_in_one_line_before_anything_is_made(fakes: Path, version: str, found: str) -> None:
    for name in ("python3", "python3.11", "python3.12"):
        (fakes / name).write_text(PYTHON % version)
        (fakes / name).chmod(0o755)
    status, said, calls = setup(fakes)
    assert (status, len(said), calls) == (1, 1, [])
    assert f"needs Python 3.11 or 3.12, and python3 {found}" in said[0]
    assert "PYTHON=/path/to/python3.12" in said[0]
    assert not (fakes.parent / ".venv").exists()


def test_a_full_disk_is_told_before_anything_is_made(fakes: Path) -> None:
    (fakes / "df").write_text("#!/bin/sh\nprintf 'Filesystem blocks Used Available\\n/dev/x 9 9 1300000\\n'\n")
    (fakes / "df").chmod(0o755)
    status, said, calls = setup(fakes)
    assert (status, len(said), calls) == (1, 1, [])
    assert ".venv takes 3 GB, and 1 GB are free" in said[0]
    assert setup(fakes, ".venv-serving")[0] == 0


def test_what_pip_is_configured_with_is_handed_on_unless_it_is_set(fakes: Path) -> None:
    (fakes / "pip.conf").write_text(
        ":env:.find-links='/wheels'\nglobal.cert='/cert.pem'\nglobal.extra-index-url='https://a/b\\nhttps://c/d'\n"
        "global.find-links='/others'\nglobal.index-url='https://mirror/simple'\nglobal.timeout='9'\n"
    )
    _, _, calls = setup(fakes, ".venv-serving", UV_INDEX="https://mine/simple")
    assert {
        "UV_FIND_LINKS=/wheels",
        "SSL_CERT_FILE=/cert.pem",
        "UV_DEFAULT_INDEX=https://mirror/simple",
        "UV_INDEX=https://mine/simple",
    } <= set(calls)
    assert "UV_INDEX=https://a/b https://c/d" in setup(fakes, ".venv-serving")[2]


@pytest.mark.parametrize("gpu", [False, True])
def test_packages_of_cuda_are_for_machines_with_a_gpu(fakes: Path, gpu: bool) -> None:
    if gpu:
        (fakes / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    status, said, calls = setup(fakes)
    installed = [call.split("--no-deps ")[1] for call in calls if "--no-deps" in call]
    build = "cuda" if gpu else "cpu"
    assert status == 0
    assert f"torch for {build}" in said[0]
    assert [re.findall(r"([a-z-]+)\.lock", call) for call in installed] == [
        ["build"],
        [f"torch-{build}"],
        ["train", "dev"],
        [],
    ]
    assert all("--require-hashes" in call for call in calls if ".lock" in call)
    assert installed[-1].endswith("--editable .")


def test_the_cpu_build_is_looked_for_at_pytorch_s_index_where_no_own_one_has_it(fakes: Path) -> None:
    status, _, calls = setup(fakes, FAIL="torch-cpu.lock", TORCH_INDEX="https://mirror/cpu")
    tried = [call for call in calls if "torch-cpu.lock" in call]
    assert status == 1
    assert ["--index-url https://mirror/cpu" in call for call in tried] == [False, True]


@pytest.mark.parametrize(
    ("cause", "told"),
    [("failed to lookup address: Temporary failure in name resolution", "no answer from the package index"),
     ("hash mismatch", ".venv: cause: hash mismatch; .venv/setup.log has the details")],
)  # fmt: skip
def test_a_failed_download_is_one_line(fakes: Path, cause: str, told: str) -> None:
    status, said, _ = setup(fakes, FAIL="train.lock", CAUSE=cause)
    assert status == 1
    assert len(said) == 2, "what is made, and why not"
    assert told in said[1]
    assert cause in (fakes.parent / ".venv" / "setup.log").read_text()


def test_the_environment_that_is_there_is_kept_where_its_python_is_the_right_one(fakes: Path) -> None:
    setup(fakes)
    (fakes.parent / ".venv" / "kept").touch()
    setup(fakes)
    assert (fakes.parent / ".venv" / "kept").exists()
    (fakes / "python3").write_text(PYTHON % "3.12")
    setup(fakes)
    assert not (fakes.parent / ".venv" / "kept").exists()
    assert os.listdir(fakes.parent / ".venv" / "bin")
