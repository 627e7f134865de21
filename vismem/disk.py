"""Disk space: the one line that a full disk ends in, whichever library met it."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vismem.errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
FULL = (*NO_SPACE, errno.EFBIG)
SAID = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "disk is full",
)  # by libraries in C and Rust


@contextmanager
def explain_full_disk(partial: Path, out: Path) -> Iterator[None]:
    """A block that writes to `partial`, later `out`: UserError where the disk was full, which names file and sizes."""
    try:
        yield
    except Exception as error:
        chain = list(_chain(error))
        if not any(is_full_disk(link) for link in chain):
            raise
        if isinstance(error, UserError):  # it says what could not be written, such as a database
            raise UserError(f"{error}; {_sizes(partial, out)}") from error
        named = [link.filename for link in chain if isinstance(link, OSError) and link.filename]
        file = named[0] if named else max(_files(partial), key=lambda path: path.stat().st_mtime_ns, default=partial)
        raise UserError(f"cannot write {file}, the disk is full: {_sizes(partial, out)}") from error


def is_full_disk(error: BaseException) -> bool:
    """Whether the error says that the disk or a quota is full."""
    return (isinstance(error, OSError) and error.errno in FULL) or any(said in str(error) for said in SAID)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _sizes(partial: Path, out: Path) -> str:
    size, there = free_space(partial)
    free = f"{megabytes(size)} free at {there}"
    if out.is_dir():
        return f"{free}, and {out} takes {megabytes(folder_size(out))}; it stays as it was. Free some and run again"
    return f"{free}, after {megabytes(folder_size(partial))} of the output. Free some and run again"


def free_space(path: Path) -> tuple[int, Path]:
    """Free bytes on the disk of a path that need not exist, and the nearest folder above it that does."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free, there


def folder_size(folder: Path) -> int:
    """Bytes of the files below the folder."""
    return sum(path.stat().st_size for path in _files(folder))


def megabytes(size: int) -> str:
    """A size in words: `12.3 MB`."""
    return f"{size / 1e6:.1f} MB"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
