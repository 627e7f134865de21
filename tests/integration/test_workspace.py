"""`vismem repro` with real DVC on a pipeline of one cheap stage: in the root, and in a profile's workspace.

At the end the project's own dvc.yaml and .gitignore, as the README has people use them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vismem.cli import main
from vismem.config import parse_config
from vismem.messages import Caller
from vismem.params_file import render_params
from vismem.workspace import make_workspace, rebase, workspace_name

ROOT = Path(__file__).parents[2]
PIPELINE = """
stages:
  prepare:
    cmd: mkdir -p artifacts/prepare && grep seed params.yaml > artifacts/prepare/seed.txt && echo ran >> ran.log
    deps: [data, vismem/data]
    params: [seed]
    outs:
      - artifacts/prepare: {persist: true}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with DVC, code, data and one profile."""
    for folder in ("vismem/data/__pycache__", "data", "deploy/profiles", ".dvc"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "vismem" / "data" / "code.py").write_text("1")
    (tmp_path / "data" / "mine.jsonl").write_text("{}")
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    (tmp_path / "deploy" / "profiles" / "toy.yaml").write_text("seed: 3\n")
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / ".dvcignore").write_text("__pycache__/\n")
    (tmp_path / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vismem.registry.live_run.BEFORE", [])  # no run in MLflow, which takes seconds to import
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "global"))
    return tmp_path


def repro(*more: str) -> None:
    here = os.getcwd()
    assert main(["repro", *more]) == 0
    assert os.getcwd() == here


def runs(folder: Path) -> int:
    log = folder / "ran.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_a_profile_has_its_own_run_and_leaves_the_root_s_alone(root: Path) -> None:
    repro("--quiet")
    toy = root / "runs" / "toy"
    repro("--profile", "toy", "--quiet")
    assert (root / "artifacts" / "prepare" / "seed.txt").read_text().startswith("seed: 0")
    assert (toy / "artifacts" / "prepare" / "seed.txt").read_text().startswith("seed: 3")
    assert (root / "dvc.lock").read_text() != (toy / "dvc.lock").read_text()
    assert (toy / "dvc.yaml").read_text() == PIPELINE
    assert (root / ".dvc" / "cache").is_dir()
    assert not (toy / ".dvc" / "cache").exists(), "the cache is shared"


def test_a_run_with_settings_is_apart_and_dvc_sees_each_changed_parameter(root: Path) -> None:
    params = (root / "params.yaml").read_text()
    repro("--quiet")
    for settings in (("--set", "seed=7"), ("--profile", "toy", "--set", "seed=8"), ("--set", "seed=9")):
        for _ in range(2):
            repro(*settings, "--quiet")
    made = {path.parents[2].name: path.read_text()[:7] for path in (root / "runs").glob("*/artifacts/prepare/seed.txt")}
    assert made == {"params~seed-7": "seed: 7", "toy~seed-8": "seed: 8", "params~seed-9": "seed: 9"}
    assert [runs(folder) for folder in (root, *sorted((root / "runs").iterdir()))] == [1, 1, 1, 1]
    assert (root / "artifacts" / "prepare" / "seed.txt").read_text() == "seed: 0\n"
    assert (root / "params.yaml").read_text() == params


def test_a_workspace_s_name_is_a_folder_s_whatever_the_settings_are() -> None:
    assert workspace_name("toy", {}) == "toy"
    values = (f"../../{'a' * 200}", f"../../{'b' * 200}", "a/b", "a b", "a_b", [","], ["."], [",", ";"])
    names = {workspace_name(None, {"base.model": value}) for value in values}
    assert len(names) == len(values)
    assert all("/" not in name and len(name) < 255 for name in names)
    assert workspace_name(None, {"a": 1, "b": 2}) == workspace_name(None, {"b": 2, "a": 1})


def dvc(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "--quiet"], cwd=folder, check=True)


def test_a_profile_s_run_is_pushed_to_the_remote_that_was_set_for_this_checkout(root: Path) -> None:
    dvc(root, "remote", "add", "--default", "storage", "s3://nobody/dvc")
    repro("--profile", "toy", "--quiet")
    dvc(root, "remote", "modify", "--local", "storage", "url", "elsewhere")
    toy = make_workspace(root / "params.yaml", "toy")
    dvc(toy, "push")
    made = toy / "artifacts" / "prepare"
    shutil.rmtree(made)
    shutil.rmtree(root / ".dvc" / "cache")
    dvc(toy, "pull")
    assert (made / "seed.txt").read_text().startswith("seed: 3")
    assert (root / "elsewhere").is_dir(), "a relative path is meant from the root"


def test_keys_of_the_remote_are_no_more_readable_in_the_workspace_and_git_ignores_them(root: Path) -> None:
    local = root / ".dvc" / "config.local"
    shutil.copy(ROOT / ".dvc" / ".gitignore", root / ".dvc")
    local.write_text("['remote \"storage\"']\n    secret_access_key = hunter2\n")
    toy = make_workspace(root / "params.yaml", "toy")
    copy = toy / ".dvc" / "config.local"
    for mode in (0o600, 0o640):
        local.chmod(mode)
        make_workspace(root / "params.yaml", "toy")
        assert copy.stat().st_mode == local.stat().st_mode
    assert "hunter2" in copy.read_text()
    assert "hunter2" not in (toy / ".dvc" / "config").read_text()
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    subprocess.run(["git", "check-ignore", "--quiet", str(copy)], cwd=root, check=True)
    local.unlink()
    make_workspace(root / "params.yaml", "toy")
    assert "hunter2" not in copy.read_text(), "taken back in the root"


def test_settings_that_dvc_cannot_read_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / ".dvc" / "config.local").write_text("no section, no value")
    assert main(["repro", "--profile", "toy"]) == 1
    assert f".dvc/config.local in {root}" in capsys.readouterr().err


def test_a_profile_s_run_is_repeated_for_a_changed_code_or_data_file_and_for_nothing_else(root: Path) -> None:
    toy = root / "runs" / "toy"
    repro("--profile", "toy", "--quiet")
    (root / "vismem" / "data" / "__pycache__" / "code.pyc").write_text("bytes")
    (root / "deploy" / "profiles" / "toy.yaml").write_text("seed: 3\nexport: {parity_items: 3}\n")
    repro("--profile", "toy", "--quiet")
    assert runs(toy) == 1
    (root / "vismem" / "data" / "code.py").write_text("2")
    repro("--profile", "toy", "--quiet")
    (root / "data" / "mine.jsonl").write_text("{}\n")
    repro("--profile", "toy", "--quiet")
    assert (runs(toy), runs(root)) == (3, 0)


def test_a_changed_source_outside_the_data_folder_is_noticed(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("LMUData")
    benchmark = {"kind": "lmudata", "name": "BLINK", "split": "test", "path": outside}
    (root / "params.yaml").write_text(render_params(parse_config({"prepare": {"sources": [benchmark]}})))
    for name, text in (("BLINK", "a"), ("BLINK", "bc"), ("MMStar", "not read")):
        (outside / f"{name}.tsv").write_text(text)
        for profile in ((), (), ("--profile", "toy")):
            repro(*profile, "--quiet")
    assert (runs(root), runs(root / "runs" / "toy")) == (2, 2)


def test_a_step_of_a_profile_s_run_names_paths_as_the_caller_sees_them(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fails = f"{sys.executable} -m vismem.cli stage1"
    (root / "dvc.yaml").write_text(PIPELINE.replace("mkdir -p", f"{fails} || mkdir -p"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (root / "deploy" / "there").mkdir()
    monkeypatch.chdir(root / "deploy" / "there")
    repro("--params", "../../params.yaml", "--profile", "toy", "--quiet")
    said = "../../runs/toy/artifacts/base is not there: run `vismem base --profile toy`"
    assert said in capfd.readouterr().err
    assert Caller.of(None) == Caller(root / "deploy" / "there"), "and no longer, once it has ended"


def test_a_failing_stage_gives_a_status_and_keeps_the_last_good_output(root: Path) -> None:
    repro("--quiet")
    (root / "dvc.yaml").write_text(PIPELINE.replace("mkdir -p", "false && mkdir -p"))
    assert main(["repro", "--quiet"]) != 0
    assert (root / "artifacts" / "prepare" / "seed.txt").read_text().startswith("seed: 0")


def test_paths_in_parameters_name_the_same_files_from_the_workspace(root: Path) -> None:
    (root / "models" / "base").mkdir(parents=True)
    (root / "mix.json").write_text("{}")
    (root / "elsewhere.jsonl").write_text("{}")
    config = parse_config(
        {
            "prepare": {
                "sources": [
                    {"kind": "jsonl", "path": "data/mine.jsonl", "split": "train"},
                    {"kind": "jsonl", "path": "elsewhere.jsonl", "split": "test"},
                    {"kind": "nlvr", "path": str(root / "elsewhere.jsonl"), "split": "test"},
                    {"kind": "scenes"},
                ]
            },
            "validate": {"task_profile": "mix.json"},
            "base": {"model": "models/base"},
        }
    )
    toy = make_workspace(root / "params.yaml", "toy")
    moved = rebase(config, root, toy)
    paths = [source.path for source in moved.prepare.sources[:3]]  # type: ignore[union-attr]
    assert paths[0] == Path("data/mine.jsonl"), "linked into the workspace, so that DVC sees it change"
    for path, target in zip(paths, ("data/mine.jsonl", "elsewhere.jsonl", "elsewhere.jsonl"), strict=True):
        assert (toy / path).samefile(root / target)
    assert moved.validate_.task_profile is not None
    assert (toy / moved.validate_.task_profile).samefile(root / "mix.json")
    assert (toy / moved.base.model).samefile(root / "models" / "base")
    assert rebase(parse_config({"base": {"model": "org/name"}}), root, toy).base.model == "org/name"


def test_making_a_workspace_again_touches_no_file_that_did_not_change(root: Path) -> None:
    toy = make_workspace(root / "params.yaml", "toy")
    before = {path: path.stat().st_mtime_ns for path in toy.rglob("*") if path.is_file()}
    assert make_workspace(root / "params.yaml", "toy") == toy
    assert {path: path.stat().st_mtime_ns for path in toy.rglob("*") if path.is_file()} == before
    assert yaml.safe_load((toy / "params.yaml").read_text())["seed"] == 3


# --- the project's own files ------------------------------------------------------------------------------------------

MINE = {"kind": "jsonl", "path": "data/mine/test.jsonl", "split": "test"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of the project with one question, in a folder of its user's."""
    for name in ("vismem", "deploy"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".env"))
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "data/README.md", "dvc.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "params.yaml").write_text(render_params(parse_config({"prepare": {"sources": [MINE]}})))
    (tmp_path / "deploy" / "profiles" / "toy.yaml").write_text("seed: 3\n")
    (tmp_path / "data" / "mine").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "mine" / "1.png")
    line = {"id": "1", "image": "1.png", "prompt": "?", "answer": "black"}
    (tmp_path / "data" / "mine" / "test.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path.parent / "site"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path.parent / "global"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--message=clone")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def prepared(folder: Path) -> dict[str, int]:
    splits = json.loads((folder / "artifacts" / "prepare" / "stats.json").read_text())["splits"]
    return {name: split["rows"] for name, split in splits.items() if split["rows"]}


@pytest.mark.parametrize("environment", [".venv", "elsewhere"])
def test_dvc_repro_runs_in_the_root_and_in_a_workspace_whether_or_not_the_environment_is_activated(
    project: Path, monkeypatch: pytest.MonkeyPatch, environment: str
) -> None:
    """Not activated: the PATH has no `vismem`, and `.venv` is the checkout's. Elsewhere: installed and on the PATH."""
    (project / environment).symlink_to(sys.prefix)
    outside = [place for place in os.environ["PATH"].split(os.pathsep) if not (Path(place) / "vismem").exists()]
    activated = [] if environment == ".venv" else [str(project / environment / "bin")]
    monkeypatch.setenv("PATH", os.pathsep.join([*activated, *outside]))
    assert (shutil.which("vismem") is None) == (environment == ".venv")
    for folder in (project, make_workspace(project / "params.yaml", "toy")):
        repro_prepare = [project / environment / "bin" / "dvc", "repro", "--quiet", "prepare"]
        subprocess.run(repro_prepare, cwd=folder, check=True)
        assert prepared(folder) == {"test": 1}
        assert str(project) not in (folder / "dvc.lock").read_text(), "a lock of every machine"


def test_what_dvc_add_writes_beside_data_can_be_committed_and_the_data_cannot(project: Path) -> None:
    for name in ("deep/er/scans", "deep/er/one.tsv", "loose"):
        (project / "data" / name).mkdir(parents=True)
        (project / "data" / name / "1.png").write_bytes(b"1")
    dvc(project, "add", "data/mine", "data/deep/er/scans")
    git(project, "add", "--all")
    assert git(project, "diff", "--cached", "--name-only").splitlines() == [
        "data/.gitignore",
        "data/deep/er/.gitignore",
        "data/deep/er/scans.dvc",
        "data/mine.dvc",
    ]
    shutil.rmtree(project / "data" / "mine")
    dvc(project, "checkout", "data/mine.dvc")
    (project / ".venv").symlink_to(sys.prefix)
    for folder in (project, make_workspace(project / "params.yaml", "toy")):
        dvc(folder, "repro", "prepare")
        assert prepared(folder) == {"test": 1}, "the pipeline reads what DVC keeps, from the root and from a workspace"
