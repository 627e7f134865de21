"""Progress: a bar on a terminal, plain lines elsewhere, nothing where it is quiet."""

import os
import pty
import subprocess
import sys

import pytest

from vismem import progress as module
from vismem.progress import progress

PROGRAM = """
from vismem.progress import progress
with progress("train", 3) as advance:
    for loss in (0.5, 0.25, 0.125):
        advance(loss=loss)
"""


def work() -> None:
    with progress("train", total=600, done=117) as advance:
        advance(loss=0.5)
        advance(2, loss=0.25, arm="vanilla")


def test_without_a_terminal_a_line_says_how_far_it_is_with_the_latest_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0)
    work()
    assert capsys.readouterr() == ("", "train: 118 of 600 loss 0.500\ntrain: 120 of 600 loss 0.250 arm vanilla\n")


def test_lines_are_at_least_the_interval_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0.0, 19.0, 20.0, 20.0, 39.0, 41.0, 41.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(seconds))
    with progress("read") as advance:
        for _ in range(4):
            advance()
    assert capsys.readouterr().err == "read: 2\nread: 4\n"


def test_quiet_work_writes_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0)
    with progress("train", 2, quiet=True) as advance:
        advance(loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_with_the_count_and_the_figures() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", PROGRAM], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "train" in shown
    assert "3/3" in shown
    assert "loss 0.125" in shown
    assert "━" in shown
