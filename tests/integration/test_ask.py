"""`vismem ask` and `vismem try`, in a folder without parameters or repository."""

import io
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from rich.console import Console

from examples.make import NOTEBOOK, run_notebook, write_questions
from vismem import ask, cli
from vismem.inference import VisMem
from vismem.shipped import shipped

IMAGE = str(shipped("examples/images/02.png"))
QUESTION = "in which place is the red triangle?"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VISMEM_DEBUG", raising=False)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def test_an_answer_has_its_memories_marked_and_streams_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "ask", "--image", IMAGE, QUESTION)
    expected = VisMem.from_pretrained(ask.DEFAULT_MODEL).answer(IMAGE, QUESTION)
    assert answer == expected.marked + "\n"
    assert "⟨short⟩" in answer
    assert run(capsys, "ask", "--image", IMAGE, QUESTION, "--stream") == answer
    without = run(capsys, "ask", "--image", IMAGE, QUESTION, "--no-memory")
    assert "⟨" not in without
    assert run(capsys, "ask", "--image", IMAGE, QUESTION, "--memory", "off") == without
    assert "⟨long⟩" not in run(capsys, "ask", "--image", IMAGE, QUESTION, "--memory", "short")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--image", "none.png"), "cannot read the image none.png: No such file or directory"),
        (("--image", "https://example.org/a.png"), "https://example.org/a.png is a URL: download it first"),
        (("--image", IMAGE, "--model", "models:/vismem@champion"), "no MLflow registry sqlite:///mlflow.db"),
        (("--image", IMAGE, "--base", "./none"), "the base './none' is not on this machine"),
        (("--image", IMAGE, "--seed", "-1"), "the seed is -1: it must be a whole number in 0.."),
    ],
)
def test_what_is_wrong_is_one_line(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str) -> None:
    assert cli.main(["ask", *argv, QUESTION]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"vismem ask: {said}")


def test_what_the_base_cannot_read_is_said_and_imports_stay_few() -> None:
    program = (
        "import sys; from vismem.cli import main; main(sys.argv[1:]); "
        "print([m for m in ('mlflow', 'pandas', 'matplotlib', 'dvc', 'onnxruntime', 'kfp') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, "ask", "--image", IMAGE, "how many cups are there?"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == "unknown words: 'cups' (the tiny VLM knows 94 words): its answer means nothing\n"


def test_try_shows_every_example_with_both_answers_and_an_honest_score() -> None:
    console = Console(file=io.StringIO(), width=1000)
    ask.try_examples(console, "PROGRAM")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    samples = ask.examples()
    assert len(samples) == 20
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == [sample.id for sample in samples]
    assert [row[4] for row in rows] == [sample.answer for sample in samples]
    right = [sum(row[arm].startswith("✓") for row in rows) for arm in (2, 3)]
    assert f"Right: {right[0]} of 20 with memory, {right[1]} without." in text
    assert any("⟨short⟩" in row[2] for row in rows)
    assert not any("⟨" in row[3] for row in rows)
    (suggested,) = (shlex.split(line) for line in text.splitlines() if line.strip().startswith("PROGRAM ask"))
    assert Path(suggested[3]).is_file()
    assert suggested[:3] + suggested[4:] == ["PROGRAM", "ask", "--image", samples[0].question]


def test_the_examples_are_the_first_of_their_seed(tmp_path: Path) -> None:
    write_questions(tmp_path)
    kept = shipped("examples")
    made = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(made) == 21
    assert all((tmp_path / name).read_bytes() == (kept / name).read_bytes() for name in made)
    assert {path.name for path in (kept / "images").iterdir()} == {
        path.name for path in (tmp_path / "images").iterdir()
    }


def test_the_notebook_runs_and_says_what_is_stored_in_it() -> None:
    stored, fresh = nbformat.read(NOTEBOOK, as_version=4), run_notebook()
    assert [cell.source for cell in fresh.cells] == [cell.source for cell in stored.cells]
    assert texts(fresh) == texts(stored)
    assert sum(len(cell) > 0 for cell in texts(stored)) > 5
    assert any("image/jpeg" in output.get("data", {}) for cell in stored.cells for output in cell.get("outputs", []))


def texts(notebook: Any) -> list[list[str]]:
    """What every cell says; an object's address and a picture's bytes aside."""
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    shown = [[output.get("text") or output["data"]["text/plain"] for output in cell] for cell in outputs]
    return [[text for text in cell if not text.startswith("<PIL")] for cell in shown]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--rows", "0", "--rows is 0: it must be at least 1"),
        ("--device", "gpu", "the device 'gpu' cannot be used: Expected one of cpu, cuda"),
    ],
)
def test_a_server_that_could_answer_nobody_is_not_started(
    capsys: pytest.CaptureFixture[str], option: str, value: str, said: str
) -> None:
    assert cli.main(["api", "--port", "0", option, value]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"vismem api: {said}")
