"""`vismem stack`, started as people start it: releases and data go through real servers, and outlive them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from project import Project
from races import Races
from real_stack import ANY_PORTS, Stack

from vismem.cli import main
from vismem.config import load_config
from vismem.params_file import render_params
from vismem.registry import release
from vismem.serving.publish import publish
from vismem.steps import STEPS

ROOT = Path(__file__).parents[2]
DEAD = "http://127.0.0.1:9"  # the discard port: nobody listens


def test_secrets_are_the_owner_s_alone_and_on_no_screen_or_command_line(stack: Stack) -> None:
    for name in ("env", "secrets.json"):
        assert (stack.folder / name).stat().st_mode & 0o777 == 0o600
    for process in psutil.Process(stack.process.pid).children(recursive=True):
        line = " ".join(process.cmdline())
        assert not [name for name, value in stack.secrets.items() if value in line], line
    assert not [name for name, value in stack.secrets.items() if value in stack.said]


def test_a_release_is_kept_in_postgresql_and_s3_by_a_client_that_has_no_key_of_the_bucket(
    stack: Stack, anywhere: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    anywhere.setenv("MLFLOW_TRACKING_URI", stack.environment["MLFLOW_TRACKING_URI"])
    project = Project(tmp_path)
    name = "kept"
    registry = project.config.registry.model_copy(update={"model_name": name})
    project.config = project.config.model_copy(update={"registry": registry})
    first = project.release(b"one", score=66.0)
    second = project.release(b"two", score=68.0)
    assert (first["promoted"], second["promoted"], project.champion()) == (True, True, "2")

    assert stack.query(f"SELECT version, run_id FROM model_versions WHERE name = '{name}' ORDER BY version") == [
        (1, project.store.client.get_model_version(name, "1").run_id),
        (2, project.store.client.get_model_version(name, "2").run_id),
    ]
    files = stack.objects("mlflow/")
    for made, weights in ((first, b"one"), (second, b"two")):
        (kept,) = [key for key in files if made["model_id"] in key and key.endswith("vismem/memory.safetensors")]
        assert files[kept] == weights
    assert [key for key in files if key.endswith("evaluate/report.html")]
    assert not (tmp_path / "mlartifacts").exists()

    assert "version 1" in release.rollback(project.config)
    assert stack.query(
        f"SELECT version FROM registered_model_aliases WHERE name = '{name}' AND alias = 'champion'"
    ) == [(1,)]

    bundle = publish(project.config, tmp_path / "models").bundle  # as the job on a cluster does, without a bucket's key
    assert (bundle / "vismem" / "memory.safetensors").read_bytes() == b"one"


def test_promoters_race_through_the_server_on_postgresql(
    stack: Stack, anywhere: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project = Project(tmp_path)
    project.connect(stack.environment["MLFLOW_TRACKING_URI"])
    races = Races(project)
    for seed in range(2):
        races.run(seed)


def test_what_was_kept_is_there_again_after_a_kill(stack: Stack, anywhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    project = Project(tmp_path)

    def use(stack: Stack) -> None:  # by the parameter, as a shared params.yaml would
        registry = {"model_name": "again", "tracking_uri": stack.environment["MLFLOW_TRACKING_URI"]}
        registry_config = project.config.registry.model_copy(update=registry)
        project.config = project.config.model_copy(update={"registry": registry_config})

    use(stack)
    project.release(b"weights", score=66.0)
    before, files = stack.secrets, stack.objects("mlflow/")
    services = psutil.Process(stack.process.pid).children(recursive=True)
    assert {"weed", "postgres"} <= {service.name() for service in services}
    stack.process.kill()
    stack.process.wait()
    stack.start()
    assert not psutil.wait_procs(services, timeout=60)[1]
    assert stack.secrets == before
    assert stack.objects("mlflow/") == files
    use(stack)
    assert project.champion() == "1"
    assert project.release(b"better", score=70.0)["version"] == "2"


def test_a_second_stack_in_the_folder_is_refused(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stack", "--data", str(stack.folder), *ANY_PORTS]) == 1
    assert f"{stack.folder} is in use" in capsys.readouterr().err


def test_a_server_that_dies_ends_the_others_and_says_which(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vismem.cli", "stack", "--data", str(tmp_path / "stack"), *ANY_PORTS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    weed: list[psutil.Process] = []
    while not weed:
        assert process.poll() is None
        services = psutil.Process(process.pid).children()
        with suppress(psutil.NoSuchProcess):  # initdb ends in the midst of it
            weed = [service for service in services if service.name() == "weed"]
        time.sleep(0.05)
    weed[0].kill()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(rf"s3 was killed by signal 9: .*; its log is {tmp_path}/stack/logs/s3\.log", said)
    assert not psutil.wait_procs(services, timeout=60)[1]


def run(folder: Path, environment: Mapping[str, str], *command: str, status: int = 0) -> str:
    """What a command says that ends with that status."""
    program = [sys.executable, "-m", "dvc", *command[1:]] if command[0] == "dvc" else list(command)
    git = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b.c"}
    git |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.c"}
    done = subprocess.run(
        program, cwd=folder, env={**os.environ, **git, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with this project's pipeline and code, and outputs of every step as a finished run leaves them."""
    folder = tmp_path_factory.mktemp("dvc") / "project"
    folder.mkdir()
    without = shutil.ignore_patterns("__pycache__", ".env")
    for name in ("assets", "vismem", "deploy"):
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", "data/README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(render_params(load_config(ROOT / "params.yaml", "smoke")))
    for step in STEPS:
        (folder / "artifacts" / step.name / "part").mkdir(parents=True)
        (folder / "artifacts" / step.name / "part" / "weights").write_bytes(step.name.encode() * 1000)
        (folder / "artifacts" / step.name / "result.json").write_text(json.dumps({"step": step.name}))
    run(folder, {}, "git", "init", "--quiet", "--initial-branch=main")
    run(folder, {}, "dvc", "commit", "--force")
    run(folder, {}, "git", "add", "--all")
    run(folder, {}, "git", "commit", "--quiet", "--message=A run")
    return folder


def test_a_fresh_clone_pulls_what_was_pushed_and_has_nothing_to_run(
    stack: Stack, anywhere: pytest.MonkeyPatch, project: Path
) -> None:
    tracked = run(project, {}, "git", "ls-files").splitlines()
    assert "dvc.lock" in tracked
    assert not [name for name in tracked if name.startswith(("artifacts", "runs"))]
    assert "pushed" in run(project, stack.environment, "dvc", "push")
    pushed = stack.objects("dvc/files/md5/")
    assert b"stage2" * 1000 in pushed.values()

    clone = project.parent / "clone"
    run(project.parent, {}, "git", "clone", "--quiet", str(project), str(clone))
    assert "up to date" in run(clone, {}, "dvc", "repro", "--allow-missing", "--dry")
    assert not (clone / "artifacts").exists()
    run(clone, stack.environment, "dvc", "pull")
    assert not (clone / "artifacts" / "base").exists(), "links to weights that are elsewhere: no copy of them is stored"
    for step in (step for step in STEPS if step.name != "base"):
        for name in ("part/weights", "result.json"):
            file = Path("artifacts") / step.name / name
            assert (clone / file).read_bytes() == (project / file).read_bytes()
    assert "up to date" in run(clone, {}, "dvc", "repro", "--allow-missing", "--dry")
    (clone / "vismem" / "registry" / "gate.py").write_text("")
    said = run(clone, {}, "dvc", "repro", "--allow-missing", "--dry")
    assert "Running stage 'register'" in said
    assert "Running stage 'export'" not in said


def test_a_store_that_is_not_there_is_named(
    anywhere: pytest.MonkeyPatch, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_MAX_ATTEMPTS": "1"}
    said = run(project, {**keys, "AWS_ENDPOINT_URL_S3": DEAD}, "dvc", "status", "--cloud", status=255)
    assert DEAD in said
    anywhere.setenv("MLFLOW_TRACKING_URI", DEAD)
    assert main(["models", "--params", str(project / "params.yaml")]) == 1
    assert f"the MLflow store {DEAD} does not answer" in capsys.readouterr().err


def test_the_pipeline_keeps_its_model_and_its_version_there(stack: Stack, tmp_path: Path) -> None:
    small = {"stage1.steps": 1, "stage2.steps": 1, "evaluate.bootstrap": 100}
    settings = [f"--set={name}={value}" for name, value in {**small, "registry.model_name": "piped"}.items()]
    done = subprocess.run(
        [
            *(sys.executable, "pipelines/run_local.py", "--profile", "smoke", "--folder", str(tmp_path), *settings),
        ],
        cwd=ROOT,
        env={**os.environ, **stack.environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ((name, version),) = stack.query("SELECT name, version FROM model_versions WHERE name = 'piped'")
    assert (name, version) == ("piped", 1)
    assert any(key.endswith("manifest.json") for key in stack.objects("mlflow/"))
