"""Reads and writes the small files between steps. A file is there whole or not at all: it is replaced in one move."""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vismem.errors import UserError


def read_json(path: Path, hint: str = "") -> Any:
    """The values of a JSON file. UserError where it is missing (with `hint`, what to do) or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is not there{f': {hint}' if hint else ''}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged, it is no JSON ({error}){f': {hint}' if hint else ''}") from None


def write_json(path: Path, values: Any) -> None:
    """Write plain values, indented, with a newline at the end. Its folder is made."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace the file in one move: who reads meanwhile sees the old text or the new one. Its folder is made.

    OSError, with the file's name, where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.parent / f".{path.name}.{os.getpid()}.new"  # `path` may be a folder, by mistake
    try:
        fresh.write_text(text)
        os.replace(fresh, path)
    except OSError as error:  # one of writing has no name
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        fresh.unlink(missing_ok=True)


def user_cache() -> Path:
    """The folder of what was fetched once and can be fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vismem"


def empty_folder(folder: Path, kept: Collection[Path] = ()) -> None:
    """Remove what is in the folder, such as what a killed run left there, but for the files `kept`."""
    for leftover in {*folder.iterdir()} - {*kept}:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Make `target` a hard link to the file `source`, or to what that links to; a copy where the file system has none.

    What is there is replaced.
    """
    Path(target).unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
