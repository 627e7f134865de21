"""Progress: a bar on a terminal, plain lines elsewhere, nothing where it is quiet."""

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from vismem import progress as module
from vismem.progress import progress

PROGRAM = """
from vismem.progress import progress
with progress("train", 3) as advance:
    for loss in (0.5, 0.25, 0.125):
        advance(loss=loss)
"""


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What the timer of the plain lines writes when it is due; here the test says when."""
    due: list[Callable[[], None]] = []

    @contextmanager
    def every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
        assert seconds == module.LINE_SECONDS
        due.append(act)
        yield

    def written() -> str:
        due[-1]()
        return capsys.readouterr().err

    monkeypatch.setattr(module, "every", every)
    return written


def test_without_a_terminal_a_line_says_how_far_it_is_with_the_latest_figures_and_the_time_left(
    line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("train", total=600, done=580) as advance:
        assert line() == "train: 580 of 600\n", "nothing done here yet: no guess"
        advance(loss=0.5)
        advance(1, loss=0.25, arm="vanilla")
        assert line() == "train: 582 of 600 loss 0.250 arm vanilla, about 3 min left\n"
        advance(18, reward=123.4)
        assert line() == "train: 600 of 600 reward 123\n"


def test_work_of_unknown_size_has_a_line_too(line: Callable[[], str]) -> None:
    with progress("read") as advance:
        assert line() == "read: in progress\n"
        advance(4)
        assert line() == "read: 4\n"


def test_lines_come_without_an_advance_until_the_work_ends() -> None:
    seen, twice = [], threading.Event()

    def act() -> None:
        seen.append(1)
        if len(seen) == 2:
            twice.set()

    with module.every(0.001, act):
        assert twice.wait(60)
    assert "repeat" not in " ".join(thread.name for thread in threading.enumerate()), "its thread has ended"


@pytest.mark.parametrize(
    ("seconds", "said"), [(5, "under 1 min"), (60, "about 1 min"), (95, "about 2 min"), (3000, "about 50 min")]
)
def test_a_guessed_time_is_told_roughly(seconds: float, said: str) -> None:
    assert module.about(seconds) == said


def test_quiet_work_writes_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0001)
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
