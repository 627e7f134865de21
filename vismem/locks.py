"""Locks on folders, so that two runs never work in one. A lock ends with the processes that hold it."""

import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vismem.errors import UserError


@contextmanager
def lock_folder(folder: Path, patience: float = 0.0) -> Iterator[int]:
    """An exclusive lock on the folder; the processes that inherit it hold it too.

    UserError where another holds it, also after `patience` seconds. On a file system
    without locks, as some network file systems are, it prints a warning and locks nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        until = time.monotonic() + patience
        while not _locked(file, folder):
            if time.monotonic() > until:
                raise UserError(
                    f"{folder} is in use: another run works there, or a step of one that was killed is still at it; "
                    "wait for it or end it, then start again"
                )
            time.sleep(0.1)
        yield file
    finally:
        os.close(file)


def _locked(file: int, folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"{folder} lies on a file system without locks: ensure that nothing else works there", file=sys.stderr)
    return True
