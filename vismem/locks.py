"""Locks on files and folders, so that two runs never work in one place. A lock ends with the processes that hold it."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vismem.errors import UserError


@contextmanager
def lock_folder(folder: Path, patience: float = 0.0) -> Iterator[int]:
    """`lock_file` on the file `lock` in the folder, which is made."""
    with lock_file(folder / "lock", str(folder), patience) as lock:
        yield lock


@contextmanager
def lock_file(file: Path, what: str, patience: float = 0.0) -> Iterator[int]:
    """An exclusive lock on the file, which says who holds it; the processes that inherit it hold it too.

    UserError that names `what` and the holder where another holds it, also after `patience` seconds. On a file system
    without locks, as some network file systems are, it prints a warning and locks nothing. The file stays; who holds
    the lock may remove it.
    """
    until = time.monotonic() + patience
    while (lock := _take(file)) is None:
        if time.monotonic() > until:
            raise UserError(f"{what} is in use{_holder(file)}")
        time.sleep(0.1)
    try:
        yield lock
    finally:
        os.close(lock)


def _take(file: Path) -> int | None:
    """The descriptor of the locked file, or None where another holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    if not _locked(lock, file.parent):
        os.close(lock)
        return None
    if not (file.exists() and os.path.samestat(os.fstat(lock), file.stat())):  # its last holder has removed it
        os.close(lock)
        return _take(file)
    with contextlib.suppress(OSError):  # a full disk: the lock holds, only its note is missing
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}).encode())
    return lock


def _locked(lock: int, folder: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"{folder} lies on a file system without locks: ensure that nothing else works there", file=sys.stderr)
    return True


def _holder(file: Path) -> str:
    """Who holds the lock, since when, and what to do."""
    try:
        note = json.loads(file.read_text())
        pid, host, since = int(note["pid"]), str(note["host"]), time.localtime(note["since"])
    except (OSError, ValueError, TypeError, KeyError):  # not yet written, or gone meanwhile
        return ": another run works there; wait for it or end it, then start again"
    here = host == socket.gethostname()
    if here and not _alive(pid):
        return (
            ": another run works there, or a step of one that was killed is still at it; "
            "wait for it or end it, then start again"
        )
    where, kill = (
        ("", f"`kill {pid}`") if here else (f" on {host}", f"`kill {pid}` there; where it is gone, delete {file}")
    )
    return (
        f" by process {pid}{where} since {time.strftime('%Y-%m-%d %H:%M:%S', since)}: wait for it, or end it ({kill})"
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
