"""The journal of a run: one small JSON file a task, in a folder or a bucket that outlives the tasks.

From it the run's summary tells what each task made, or why it failed: a pipeline's last task sees nothing else of the
others. A task that was killed could not say so; its entry still says "running".
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

RUN = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[^/]+-\d{4}(?:-\d{2}){5}-\d{6}")


@dataclass(frozen=True)
class Entry:
    """What is known of a task. `state`: running, succeeded or failed. `text`: the step's line, or why it failed."""

    task: str
    state: str
    started: float  # seconds since 1970
    seconds: float = 0.0
    text: str = ""


@dataclass
class Page:
    """An entry that is being written; whoever does the work puts its line here."""

    text: str = ""


def run_of(uri: str) -> str:
    """The run that an output belongs to, read from its place: Kubeflow's id of it, or the local runner's folder."""
    found = RUN.findall(uri)
    return str(found[0]) if found else "run"


@contextmanager
def entry(journal: str, run: str, task: str) -> Iterator[Page]:
    """Note that a task is running, and at the end how it went. Without a `journal` nothing is noted."""
    noted, page = Entry(task, "running", time.time()), Page()
    _write(journal, run, noted)
    try:
        yield page
    except BaseException as error:
        text = str(error) or type(error).__name__
        _write(journal, run, replace(noted, state="failed", seconds=time.time() - noted.started, text=text))
        raise
    _write(journal, run, replace(noted, state="succeeded", seconds=time.time() - noted.started, text=page.text))


def read(journal: str, run: str) -> list[Entry]:
    """All entries of a run, in the order in which the tasks started; none without a `journal`. OSError as it comes."""
    if not journal:
        return []
    filesystem, folder = _open(journal, run)
    if not filesystem.isdir(folder):
        return []
    names = [name for name in filesystem.ls(folder, detail=False) if name.endswith(".json")]
    entries = [Entry(**json.loads(filesystem.cat_file(name))) for name in names]
    return sorted(entries, key=lambda item: item.started)


def _write(journal: str, run: str, noted: Entry) -> None:
    """A journal that cannot be written must not end the work that it tells of: that is said on stderr instead."""
    if not journal:
        return
    faults: tuple[type[Exception], ...] = (OSError,)
    if journal.startswith("s3:"):
        from botocore.exceptions import BotoCoreError  # S3's client does not turn all of them into OSError

        faults = (OSError, BotoCoreError)
    try:
        filesystem, folder = _open(journal, run)
        filesystem.makedirs(folder, exist_ok=True)
        filesystem.pipe_file(f"{folder}/{noted.task}.json", json.dumps(asdict(noted)).encode())
    except faults as error:
        print(f"the journal {journal} cannot be written: {error}", file=sys.stderr)


def _open(journal: str, run: str) -> tuple[Any, str]:
    """The file system of the journal, and the run's folder in it. S3: the client's own AWS_... variables say where."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    filesystem, folder = url_to_fs(journal)
    return filesystem, f"{folder.rstrip('/')}/{run}"
