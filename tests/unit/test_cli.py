"""The command line, run as people run it: bad input ends with one line that says what to do, and status 1."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vismem.cli import build_parser, main
from vismem.config import Config
from vismem.params_file import render_params
from vismem.steps import STEPS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with parameters and one profile, and the working directory in it."""
    (tmp_path / "params.yaml").write_text(render_params(Config()))
    (tmp_path / "deploy" / "profiles").mkdir(parents=True)
    (tmp_path / "deploy" / "profiles" / "smoke.yaml").write_text("seed: 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VISMEM_DEBUG", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a failing command says."""
    assert main(argv) == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.strip().splitlines()
    assert line.startswith(f"vismem {argv[0]}: ")
    return line


def test_there_is_a_command_for_every_step() -> None:
    for step in STEPS:
        parsed = build_parser().parse_args([step.name, "--profile", "smoke", "--artifacts", "elsewhere"])
        assert (parsed.command, parsed.profile, parsed.artifacts) == (step.name, "smoke", Path("elsewhere"))


def test_help_needs_nothing_heavy() -> None:
    program = (
        "import sys, vismem.cli; vismem.cli.build_parser().format_help(); "
        "print([m for m in ('torch', 'transformers', 'mlflow', 'dvc', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_parameter_is_named_with_the_nearest(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").write_text("memory: {querys: 3}\n")
    assert "'memory.querys' (did you mean 'queries'?)" in failure(capsys, "prepare")


def test_a_missing_parameter_file_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no parameter file other.yaml" in failure(capsys, "prepare", "--params", "other.yaml")


@pytest.mark.parametrize("command", ["prepare", "repro", "params", "summary"])
def test_a_wrong_profile_is_named_by_every_command(
    project: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert "unknown profile 'smoek' (did you mean 'smoke'?)" in failure(capsys, command, "--profile", "smoek")
    assert not (project / "runs").exists()


def test_a_step_without_its_input_says_what_to_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, "stage1")
    assert "stage1 needs the output of 'base'" in said
    assert "run `vismem base`" in said
    assert not (project / "artifacts").exists()


def test_a_missing_source_file_is_named_and_the_old_output_stays(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "artifacts" / "prepare").mkdir(parents=True)
    (project / "artifacts" / "prepare" / "stats.json").write_text("{}")
    (project / "params.yaml").write_text("prepare: {sources: [{kind: jsonl, path: data/mine.jsonl, split: test}]}\n")
    assert "data/mine.jsonl" in failure(capsys, "prepare")
    assert (project / "artifacts" / "prepare" / "stats.json").read_text() == "{}"


def test_repro_outside_a_project_says_where_to_go(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no dvc.yaml in" in failure(capsys, "repro")


def test_repro_takes_no_artifacts_folder(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "dvc.yaml says where" in failure(capsys, "repro", "--artifacts", "x")


def test_a_summary_before_the_run_says_what_is_missing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "artifacts/evaluate/metrics.json is not there: run `vismem evaluate`" in failure(capsys, "summary")


def test_a_missing_image_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "missing.png" in failure(capsys, "infer", "--image", "missing.png", "--prompt", "what is this?")


def test_serve_before_deploy_says_what_to_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "artifacts/deploy/model_repository" in failure(capsys, "serve")


def test_a_port_in_use_is_named_with_the_flag_that_changes_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert f"port {port} on 127.0.0.1 cannot be used" in failure(capsys, "ui", "--port", str(port))


def test_an_argument_that_no_command_knows_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--prams", "x"])
    assert stopped.value.code == 2
    assert "--prams" in capsys.readouterr().err


def test_params_prints_what_is_in_force(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--profile", "smoke"]) == 0
    assert "\nseed: 3  # seed of every random choice\n" in capsys.readouterr().out
    assert main(["params", "--defaults"]) == 0
    assert capsys.readouterr().out == render_params(Config())


def test_a_profile_works_in_its_own_workspace(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage1", "--profile", "smoke"]) == 1
    assert Path(os.getcwd()) == project / "runs" / "smoke"
    assert "and artifacts/base is not there" in capsys.readouterr().err
    assert "seed: 3" in (project / "runs" / "smoke" / "params.yaml").read_text()
    assert not (project / "artifacts").exists()
