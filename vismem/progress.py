"""The one progress display: a bar on a terminal, else a plain line from time to time."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 20.0  # between two plain lines

Advance = Callable[..., None]


@contextmanager
def progress(name: str, total: int | None = None, done: int = 0, *, quiet: bool = False) -> Iterator[Advance]:
    """Show on stderr how far long work is; yields `advance(count=1, **figures)`, to be called after each part of it.

    `total` is None where it is not known; `done` is what an earlier run did; `quiet` shows nothing. The latest
    `figures`, numbers or texts, stand beside the count. A plain line comes every LINE_SECONDS, advanced or not.
    """
    if quiet:
        yield lambda count=1, **figures: None
    elif sys.stderr.isatty():
        left = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        right = TimeRemainingColumn(), TextColumn("{task.fields[figures]}")
        with Progress(*left, *right, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total, completed=done, figures="")
            yield lambda count=1, **figures: bar.update(task, advance=count, figures=_text(figures))
    else:
        started, before, latest = time.monotonic(), done, ""

        def advance(count: int = 1, **figures: Any) -> None:
            nonlocal done, latest
            done, latest = done + count, _text(figures)

        def write() -> None:
            left = _time_left(time.monotonic() - started, done - before, None if total is None else total - done)
            counted = f"{done} of {total}" if total is not None else f"{done}" if done else "in progress"
            print(f"{name}: {' '.join(filter(None, [counted, latest]))}{left}", file=sys.stderr, flush=True)

        with every(LINE_SECONDS, write):
            yield advance


@contextmanager
def every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` every so many seconds, in a thread, until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            act()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def about(seconds: float) -> str:
    """A time that is not known exactly, in words: `about 3 min`."""
    return f"about {round(seconds / 60)} min" if seconds >= 90 else "about 1 min" if seconds >= 45 else "under 1 min"


def _time_left(seconds: float, done: int, left: int | None) -> str:
    """`, about 3 min left`, where it can be told from what was done in so many seconds."""
    return f", {about(left * seconds / done)} left" if done > 0 and left is not None and left > 0 else ""


def _text(figures: Mapping[str, Any]) -> str:
    shown = {key: f"{value:#.3g}".rstrip(".") if isinstance(value, float) else value for key, value in figures.items()}
    return " ".join(f"{key} {value}" for key, value in shown.items())
