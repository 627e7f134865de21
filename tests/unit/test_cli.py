"""The command line, run as people run it: bad input ends with one line that says what to do, and status 1."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vismem.cli import build_parser, main
from vismem.config import Config, parse_config
from vismem.params_file import render_params
from vismem.steps import STEPS, Step

HEAVY = ("torch", "transformers", "mlflow", "dvc", "pandas", "matplotlib", "scipy", "pyarrow")


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


def test_what_people_look_at_needs_nothing_heavy(project: Path) -> None:
    """With something to show: test_summary.py, and tests/integration/test_listing.py."""
    calls = (
        ["--help"],
        ["params"],
        ["summary"],
        ["models"],
        ["models", "show"],
        ["completion", "bash"],
        ["infer", "--help"],
        ["ask", "--help"],
        ["stage1", "--help"],
    )
    program = (
        "import sys, vismem.cli\n"
        f"for call in {calls}:\n"
        "    try: vismem.cli.main(call)\n"
        "    except SystemExit: pass\n"
        f"sys.exit(str([name for name in {HEAVY} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_an_unknown_parameter_is_named_with_the_nearest(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").write_text("memory: {querys: 3}\n")
    assert "'memory.querys' (did you mean 'memory.queries'?)" in failure(capsys, "prepare")


def test_a_missing_parameter_file_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no parameter file other.yaml" in failure(capsys, "prepare", "--params", "other.yaml")


def test_a_section_that_stands_twice_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "deploy" / "profiles" / "smoke.yaml").write_text(
        "stage1: {steps: 5}\nseed: 3\nstage1: {epochs: 2}\n? [odd]\n: 1\n"
    )
    assert main(["params", "--profile", "smoke"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "smoke.yaml is not valid YAML: 'stage1' stands there twice" in said
    assert "line 3" in said


def test_what_yaml_merges_stands_there_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = project / "deploy" / "profiles" / "smoke.yaml"
    profile.write_text(
        "stage1: &one {steps: 5, group_size: 4}\nstage2: &two {<<: *one, steps: 7}\nbaselines: {grpo: {<<: *two}}\n"
    )
    assert main(["params", "--profile", "smoke"]) == 0
    capsys.readouterr()
    profile.write_text("stage1: !!map 5\n")
    assert "smoke.yaml is not valid YAML" in failure(capsys, "params", "--profile", "smoke")


def test_a_file_that_the_shell_has_emptied_is_no_file_of_defaults(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "params.yaml").write_text("")
    assert "params.yaml is empty: restore it, or write the defaults by `vismem" in failure(capsys, "params")
    assert main(["params", "--defaults"]) == 0


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


def test_a_suite_without_a_trained_model_says_where_to_get_one(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failure(capsys, "evaluate", "--suite", "paper")
    assert said.endswith("no trained model artifacts/stage2: name one with --model, or run `vismem repro`")
    said = failure(capsys, "evaluate", "--suite", "paper", "--profile", "smoke")
    assert "runs/smoke/artifacts/stage2: name one with --model, or run `vismem repro --profile smoke`" in said


@pytest.mark.parametrize(
    "action", [("verify",), ("compare",), ("promote", "1"), ("rollback",), ("rollback", "--to", "1"), ("delete", "1")]
)
def test_looking_for_versions_makes_no_registry(
    project: Path, capsys: pytest.CaptureFixture[str], action: tuple[str, ...]
) -> None:
    assert "no MLflow registry sqlite:///mlflow.db here: run in the project's" in failure(capsys, "models", *action)
    assert not (project / "mlflow.db").exists()


def test_drift_makes_no_registry(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no MLflow registry sqlite:///mlflow.db here" in failure(capsys, "drift", "--request-log", "log")
    assert not (project / "mlflow.db").exists()


def test_the_version_to_delete_must_be_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name the version to delete: `vismem models delete 8`" in failure(capsys, "models", "delete")


def test_what_to_do_where_a_version_is_not_there(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, "models", "show", "3")
    assert said.endswith("versions: none: run `vismem repro`, or set MLFLOW_TRACKING_URI")


def test_repro_outside_a_project_says_where_to_go(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no dvc.yaml in" in failure(capsys, "repro")


def test_repro_takes_no_artifacts_folder(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "dvc.yaml says where" in failure(capsys, "repro", "--artifacts", "x")


def test_a_summary_before_the_run_says_what_is_missing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, "summary").endswith("no run yet, artifacts/evaluate is not there: run `vismem repro`")
    said = failure(capsys, "summary", "--profile", "smoke")
    assert said.endswith("no run yet, runs/smoke/artifacts/evaluate is not there: run `vismem repro --profile smoke`")


def test_a_missing_image_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "text.png").write_text("no picture")
    for name, reason in (
        ("missing.png", f"image missing.png: No such file or directory (from the current folder {project})"),
        ("/missing.png", "cannot read the image /missing.png: No such file or directory"),
        ("text.png", "text.png (10 bytes) does not decode: it is no PNG, JPEG, WEBP file"),
        ("https://host/a.png", "https://host/a.png is a URL: download it first and give the file"),
    ):
        assert reason in failure(capsys, "infer", "--image", name, "what is this?")


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
    said = capsys.readouterr().err
    assert "and runs/smoke/artifacts/base is not there: run `vismem base --profile smoke`" in said, "seen from the root"
    assert "seed: 3" in (project / "runs" / "smoke" / "params.yaml").read_text()
    assert not (project / "artifacts").exists()


def test_a_setting_is_in_force_for_one_command(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--set", "stage1.steps=7", "--set", "stage1.learning_rate=1e-4", "--set", "prepare.sources.0.train=9")
    for profile in ((), ("--profile", "smoke")):
        assert main(["params", *profile, *settings]) == 0
        config = parse_config(yaml.safe_load(capsys.readouterr().out))
        assert (config.seed, config.stage1.steps, config.stage1.learning_rate) == (3 if profile else 0, 7, 1e-4)
        assert config.prepare.sources[0] == Config().prepare.sources[0].model_copy(update={"train": 9})
    assert (project / "params.yaml").read_text() == render_params(Config())


def test_a_setting_in_a_profile_s_workspace_names_files_as_the_caller_sees_them(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "[{kind: jsonl, path: mine/a.jsonl, split: test}]"
    assert " mine/a.jsonl:" in failure(capsys, "prepare", "--profile", "smoke", "--set", f"prepare.sources={source}")
    workspace = (project / "runs" / "smoke" / "params.yaml").read_text()
    assert parse_config(yaml.safe_load(workspace)) == Config(seed=3), "a setting is the command's, not the workspace's"


@pytest.mark.parametrize("command", ["prepare", "repro", "summary", "models", "infer", "params"])
def test_a_wrong_setting_is_named_with_the_nearest(
    project: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    image = ("--image", "a.png", "what?") if command == "infer" else ()
    said = failure(capsys, command, "--set", "stage1.stepz=3", "--set", "sede=1", *image)
    assert "params.yaml with --set: unknown key 'stage1.stepz' (did you mean 'stage1.steps'?)" in said
    assert "unknown key 'sede' (did you mean 'seed'?)" in said
    assert not (project / "runs").exists()


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(project: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vismem.cli", "params"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("line", ["models promote --to 3", "models show --unblock", "models rollback --data v1"])
def test_an_option_of_another_action_is_not_passed_over(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"vismem models: {line.split()[2]} goes with `vismem models "), said


def test_a_package_that_is_not_installed_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(step: Step) -> None:
        raise ModuleNotFoundError("No module named 'great_expectations.core'", name="great_expectations.core")

    monkeypatch.setattr(Step, "load", load)
    assert main(["prepare"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vismem prepare: the Python package 'great_expectations' is not installed")


def test_an_input_that_the_step_does_not_read_is_refused_and_not_left_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a slip of the pen would train on what lies in the artifacts' folder."""
    (tmp_path / "params.yaml").write_text("")
    for step, said in (
        ("stage1", "--input validat: it reads base, validate (did you mean 'validate'?)"),
        ("prepare", "--input validat: it reads no step"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([step, "--params", str(tmp_path / "params.yaml"), "--input", f"validat={tmp_path}"])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
