"""The one progress display: a bar on a terminal, else a plain line from time to time."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 20.0  # min time between two plain lines

Advance = Callable[..., None]


@contextmanager
def progress(name: str, total: int | None = None, done: int = 0, *, quiet: bool = False) -> Iterator[Advance]:
    """Show on stderr how far long work is; yields `advance(count=1, **figures)`, to be called after each part of it.

    `total` is None where it is not known; `done` is what an earlier run did; `quiet` shows nothing. The latest
    `figures`, numbers or texts, stand beside the count.
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
        written = time.monotonic()

        def advance(count: int = 1, **figures: Any) -> None:
            nonlocal done, written
            done += count
            if time.monotonic() - written >= LINE_SECONDS:
                written = time.monotonic()
                of = "" if total is None else f" of {total}"
                print(f"{name}: {done}{of} {_text(figures)}".rstrip(), file=sys.stderr, flush=True)

        yield advance


def _text(figures: Mapping[str, Any]) -> str:
    shown = {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in figures.items()}
    return " ".join(f"{key} {value}" for key, value in shown.items())
