"""Messages from inside a profile's workspace, as the person outside sees them."""

import errno
from argparse import _SubParsersAction
from pathlib import Path

import pytest

from vismem.cli import build_parser
from vismem.messages import Caller


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a link, and the process in it; the caller stands in its root."""
    folder = tmp_path / "runs" / "toy"
    folder.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (folder / "data").symlink_to("../../data")
    monkeypatch.chdir(folder)
    return tmp_path


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (
            "artifacts/base is not there: run `vismem base`",
            "runs/toy/artifacts/base is not there: run `vismem base --profile toy`",
        ),
        ("see artifacts/validate/report.html.", "see runs/toy/artifacts/validate/report.html."),
        ("data/mine.jsonl line 3", "data/mine.jsonl line 3"),
        ("../../elsewhere/a.png: no", "elsewhere/a.png: no"),
        ("in sqlite:///mlflow.db; log", "in sqlite:///runs/toy/mlflow.db; log"),
        ("sqlite:////abs/mlflow.db, /abs/data/x", "sqlite:////abs/mlflow.db, /abs/data/x"),
        ("http://data/x and models:/data/3", "http://data/x and models:/data/3"),
        ("seed in params.yaml; 3/4 and/or x", "seed in params.yaml; 3/4 and/or x"),
        ("`vismem models list`, `vismem infer`", "`vismem models list --profile toy`, `vismem infer`"),
    ],
)
def test_paths_and_commands_are_the_caller_s(workspace: Path, inside: str, outside: str) -> None:
    assert Caller(workspace, "toy").shown(inside) == outside
    assert Caller(workspace).shown(inside) == inside


def test_no_command_is_named_with_a_profile_that_it_does_not_take(workspace: Path) -> None:
    commands = next(action for action in build_parser()._actions if isinstance(action, _SubParsersAction)).choices
    without = [name for name, parser in commands.items() if "--profile" not in parser._option_string_actions]
    assert {"api", "ask"} <= {*without}
    for name in without:
        assert Caller(workspace, "toy").shown(f"`vismem {name} X`") == f"`vismem {name} X`"


def test_a_path_is_seen_from_the_caller_s_folder(workspace: Path) -> None:
    assert Caller(workspace, "toy").path(Path("artifacts")) == "runs/toy/artifacts"
    assert Caller(workspace / "data").path(Path("artifacts")) == "../runs/toy/artifacts"


def test_a_program_off_the_path_is_named_by_its_place(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = workspace / ".venv" / "bin" / "vismem"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(script.with_name("python")))
    monkeypatch.setenv("PATH", "/nowhere")
    assert Caller(workspace, "toy").program() == [".venv/bin/vismem"]
    monkeypatch.setenv("PATH", str(script.parent))
    assert Caller(workspace, "toy").program() == ["vismem"]
    script.unlink()
    assert Caller(workspace, "toy").program() == [str(script.with_name("python")), "-m", "vismem.cli"]


def test_a_full_disk_names_the_file_and_what_is_free(tmp_path: Path) -> None:
    file = tmp_path / "not" / "yet" / "model.bin"
    said = Caller(tmp_path).explain(OSError(errno.ENOSPC, "No space left on device", str(file)))
    assert said.startswith(f"cannot write {file}, the disk is full: ")
    assert f" MB are free in {tmp_path}; free some and run the same command again" in said


def test_an_error_of_the_system_names_the_file_without_its_number(tmp_path: Path) -> None:
    assert (
        Caller(tmp_path).explain(PermissionError(errno.EACCES, "Permission denied", "a/b")) == "a/b: Permission denied"
    )
    assert Caller(tmp_path).explain(OSError("no\n number")) == "no number"
