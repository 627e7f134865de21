"""What readers share: files that stay inside their source's folder, JSON lines, columns that must be there."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from vismem.errors import UserError


def inside(folder: Path, path: Path, where: str) -> Path:
    """`path`, a file or folder that the data names at `where`, once links and `..` are followed.

    UserError if it is outside `folder`, whether or not it is there.
    """
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null byte
        raise UserError(f"{where}: {str(path)[:200]!r} is no path: {error}") from None
    if not target.is_relative_to(folder.resolve()):
        raise UserError(
            f"{where}: {path} leads to {target}, outside the source's folder {folder}: copy the file into that folder, "
            "only what is inside is read"
        )
    return target


def json_lines(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place and object; blank lines are skipped. UserError as from `json_object`."""
    for where, line in numbered_lines(path):
        yield where, json_object(line, where, needed)


def numbered_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line's place, such as "train.jsonl, line 3", and bytes; blank lines are skipped."""
    with path.open("rb") as lines:
        yield from ((f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())


def json_object(line: bytes, where: str, needed: Sequence[str]) -> dict[str, Any]:
    """The object in one line. An entry of `needed` is a key, or "KEY or KEY".

    UserError, naming the line, for text that is not UTF-8, broken JSON, what is no object, and missing keys.
    """
    row = _object(line, where)
    if missing := [keys for keys in needed if not row.keys() & set(keys.split(" or "))]:
        there = _names(row) or "no keys"
        raise UserError(f"{where}: no {_names(missing)}; the line has {there}. Needed: {', '.join(needed)}")
    return row


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:  # a surrogate without its other half is no text
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {not_utf8(error)}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise UserError(f"{where}: {half} is half of a character, which is no text: write the whole one") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error.msg} at column {error.colno}): one object per line") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply: an object with texts and lists of texts is needed") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where}: broken JSON ({str(error).split(';')[0]})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: an object {{...}} is needed, not a {type(row).__name__}")
    return row


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is said of text that is not UTF-8."""
    return f"not UTF-8 text ({error.reason} at byte {error.start}): save the file as UTF-8"


def _names(keys: Collection[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys).replace(" or ", "' or '")


def require_columns(path: Path, needed: Sequence[str], there: Collection[str]) -> None:
    """UserError, naming both, where a table lacks columns."""
    if missing := [name for name in needed if name not in there]:
        lack = f"no column {', '.join(missing)}; it has {', '.join(there)}"
        raise UserError(f"{path}: {lack}. Needed: {', '.join(needed)}")
