"""`vismem sweep` on experiments that DVC itself has queued, run and shown, in a repository of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vismem.cli import main
from vismem.evaluation.sweep import SCORES, experiments, shown_by_dvc

STEP = """import json, pathlib, yaml
queries = yaml.safe_load(open("params.yaml"))["memory"]["queries"]
out = pathlib.Path("artifacts/evaluate"); out.mkdir(parents=True)
(out / "scores.json").write_text(json.dumps({"gain": {"points": queries / 2, "low": 0.0, "high": float(queries)}}))
"""


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # its workers call `dvc`
    for name in ("author", "committer"):
        monkeypatch.setenv(f"GIT_{name.upper()}_NAME", name)
        monkeypatch.setenv(f"GIT_{name.upper()}_EMAIL", f"{name}@example.org")
    stage = {"cmd": f"{sys.executable} step.py", "params": ["memory"], "outs": ["artifacts/evaluate"]}
    Path("step.py").write_text(STEP)
    Path("params.yaml").write_text(yaml.safe_dump({"memory": {"queries": 8}}))
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"evaluate": stage}, "metrics": [SCORES]}))
    run("git", "init", "-q", "-b", "master")
    run("dvc", "init", "-q")
    run("dvc", "config", "core.analytics", "false")
    run("git", "add", "-A")
    run("git", "commit", "-qm", "begin")
    return tmp_path


def test_the_experiments_of_dvc_become_a_page(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep"]) == 1
    assert "queue some with `dvc exp run --queue" in capsys.readouterr().err
    run("dvc", "exp", "run", "--queue", "-S", "memory.queries=2,4", "evaluate")
    run("dvc", "exp", "run", "--run-all")
    assert main(["sweep", "--out", "page.html"]) == 0
    assert capsys.readouterr().out == "sweep: page.html\n"
    page = Path("page.html").read_text()
    for queries in (2, 4):
        assert f'data-tip="memory.queries {queries}: {queries / 2:+.1f} points (+0.0 to +{queries}.0), ' in page


def test_scores_of_a_run_are_not_shown_under_parameters_that_were_edited_since(project: Path) -> None:
    def found() -> list[tuple[str, int]]:
        return [(each.name, each.parameters["memory.queries"]) for each in experiments(shown_by_dvc())]

    run(sys.executable, "step.py")
    assert found() == [], "by hand: nobody knows with which parameters"
    shutil.rmtree("artifacts")
    run("dvc", "repro", "-q")
    assert found() == [("workspa", 8)]
    run("git", "add", "-A")
    run("git", "commit", "-qm", "ran")
    Path("params.yaml").write_text(yaml.safe_dump({"memory": {"queries": 16}}))
    assert found() == [("master", 8)]
    run("git", "commit", "-qam", "edited")
    assert found() == []


def test_outside_a_project_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("vismem sweep: `dvc exp show` failed (")
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
