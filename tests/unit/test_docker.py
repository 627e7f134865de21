"""The container images' files: Dockerfiles that hold what they promise, built from the environments' locks."""

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = ("train.Dockerfile", "serve.Dockerfile")


def instructions(dockerfile: str) -> list[str]:
    text = (DOCKER / dockerfile).read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", "").splitlines() if line.strip()]


BASES = {
    "train.Dockerfile": r"ARG BASE=\S+:3\.11-slim-bookworm@sha256:[0-9a-f]{64}",
    "serve.Dockerfile": r"ARG BASE=nvcr\.io/nvidia/tritonserver:(2[5-9])\.(\d\d)-py3",
}


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_starts_from_a_pinned_base_and_ends_as_an_ordinary_user(dockerfile: str) -> None:
    lines = instructions(dockerfile)
    assert re.fullmatch(BASES[dockerfile], lines[0])
    assert {line.split(" AS ")[0] for line in lines if line.startswith("FROM")} == {"FROM ${BASE}"}
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    after = lines[lines.index("USER 1000:1000") :]
    assert not [line for line in after if line.startswith(("RUN", "COPY", "ADD"))]
    assert all("org.opencontainers.image." + label in "".join(lines) for label in ("version", "revision", "source"))


def test_the_triton_of_clusters_has_the_fixes_since_25_07_and_no_wheel_s_triton_beside_it() -> None:
    match = re.fullmatch(BASES["serve.Dockerfile"], instructions("serve.Dockerfile")[0])
    assert match
    assert (int(match[1]), int(match[2])) >= (25, 7)
    assert "ARG LOCK=triton" in instructions("serve.Dockerfile")
    lock = (ROOT / "deploy/environments/triton.lock").read_text()
    assert "nvidia-pytriton" not in lock


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_packages_come_from_locks_only(dockerfile: str) -> None:
    runs = " ".join(line for line in instructions(dockerfile) if line.startswith("RUN"))
    assert runs.count("-m pip ") == runs.count("--require-hashes --no-deps") + runs.count("--no-index")
    assert "apt" not in runs


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_an_image_copies_is_there_and_let_through(dockerfile: str) -> None:
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = [
        line.split()[1:-1] for line in instructions(dockerfile) if line.startswith("COPY") and "--from" not in line
    ]
    assert copies
    for source in (source for line in copies for source in line):
        source = source.replace("$TORCH", "cuda").replace("$LOCK", "triton")
        assert list(ROOT.glob(source)), f"{source} is not there"
        assert any(fnmatch(source, pattern) for pattern in let_through), f".dockerignore keeps {source} out"


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_holds_the_profiles_beside_the_library_where_a_pod_looks_for_them(dockerfile: str) -> None:
    assert {"COPY deploy/profiles /opt/vismem/deploy/profiles", "COPY vismem /opt/vismem/vismem"} <= set(
        instructions(dockerfile)
    )


def test_the_training_image_copies_all_that_the_library_s_build_puts_into_it() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = {word for line in instructions("train.Dockerfile") if line.startswith("COPY") for word in line.split()}
    assert {*build["packages"], *build["force-include"]} <= copied


def build(**settings: str) -> list[str]:
    """What `make images` would run: the engine is `echo`."""
    environment = {"PATH": "/usr/bin:/bin", "ENGINE": "echo", **settings}
    done = subprocess.run(
        ["sh", DOCKER / "build.sh"], env=environment, capture_output=True, text=True, check=True, cwd="/"
    )
    return [line for line in done.stdout.splitlines() if line.startswith("build ")]


def test_make_images_names_both_images_after_version_and_commit() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    serve, train = build()
    assert f"--tag vismem-train:{version} " in train
    assert f"--tag vismem-serve:{version} " in serve
    assert "--tag vismem-serve:latest " in serve
    assert f"REVISION={commit.strip()}" in train
    assert "TORCH=cuda" in train
    assert "TORCH" not in serve


def test_make_images_takes_mirrors_and_names_from_the_environment_only() -> None:
    serve, train = build(
        TORCH="cpu", TORCH_INDEX="", BASE="mirror/python@sha256:0", PIP_CONF="/etc/p", REGISTRY="r.example/t", TAG="7"
    )
    assert "BASE=mirror/python@sha256:0" in train
    assert "BASE=" not in serve
    for line in (train, serve):
        assert "--secret id=pip_conf,src=/etc/p" in line
    assert "--tag r.example/t/vismem-train:7 " in train
    assert "latest" not in train
    assert "--build-arg TORCH=cpu --build-arg TORCH_INDEX= " in train
    assert [line.split("--file ")[1].split()[0] for line in build(IMAGES="serve")] == ["deploy/docker/serve.Dockerfile"]


def test_make_images_takes_another_triton_and_the_wheel_s_for_one_machine() -> None:
    serve, _ = build(TRITON="mirror/triton@sha256:1", BASE="mirror/python@sha256:0")
    assert "--build-arg BASE=mirror/triton@sha256:1" in serve
    assert "LOCK" not in serve
    serve, _ = build(TRITON="wheel")
    assert f"--build-arg {instructions('train.Dockerfile')[0].removeprefix('ARG ')} --build-arg LOCK=serve" in serve
    assert "--build-arg TRITON= " in serve
    assert "--build-arg BASE=mirror/python@sha256:0 " in build(TRITON="wheel", BASE="mirror/python@sha256:0")[0]
