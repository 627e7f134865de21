"""The rows of a user's files, checked one by one: what is good, and what is wrong with the others."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vismem.config import ValidateConfig
from vismem.config.data import Split
from vismem.data.collate import target_text
from vismem.data.fingerprint import ImageFacts, image_cache, sample_pictures
from vismem.data.readers import jsonl
from vismem.data.readers.files import json_object, numbered_lines
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.progress import progress
from vismem.runtime.images import DATA_URI
from vismem.runtime.reserved import Reserved
from vismem.validation.rows import row_faults

NEEDED = tuple(key for key in jsonl.NEEDED if key != "id")  # a missing id is given
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "dev": "validation", "test": "test"}


@dataclass(frozen=True)
class File:
    """One file of the user's, the folder of its images, and the split that all of its rows are for."""

    path: Path
    images: Path
    split: Split | None = None  # None: rows say it, or it is chosen


@dataclass(frozen=True)
class Row:
    """A good row."""

    where: str  # "train.jsonl, line 3", the path as the user gave it
    values: dict[str, Any]  # as it will be written: the user's keys, an id, paths from the common folder of images
    split: Split | None
    pictures: tuple[bytes, ...]  # images and videos by their pixels, hashes
    group: str | None  # what must not be parted besides: the row's key `group`
    sides: tuple[tuple[int, int], ...]  # width and height of each image, pixels
    question: str
    answer: str
    target: str  # what the model learns to write: rationale, mark, answer
    doubts: tuple[str, ...] = ()  # why the base cannot read it
    choices: tuple[str, ...] = ()  # in the order of the alphabet


@dataclass
class Rows:
    """What the files hold."""

    images: Path  # the folder that the paths in `good` start at
    good: list[Row] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # one line each: where and what
    duplicates: list[str] = field(default_factory=list)
    named: int = 0  # rows that got an id

    @property
    def total(self) -> int:
        """Every row that is not blank."""
        return len(self.good) + len(self.bad) + len(self.duplicates)


def read_rows(
    files: Sequence[File],
    settings: ValidateConfig,
    doubts: Callable[[Sample], Sequence[str]],
    reserved: Reserved | None = None,
) -> Rows:
    """Check every row of the files by itself and against those before it.

    `doubts` are the base's, `reserved` its own tokens, where they are known.

    A row is a duplicate where its id, or its question about the same images, was there before. UserError for a file
    that cannot be read; what is wrong with a row is counted.
    """
    for file in files:
        _require_file(file)
    rows = Rows(_common([file.images for file in files]))
    examine = image_cache(settings.max_pixels)
    ids, asked, unnamed = dict[str, str](), dict[tuple[object, ...], Row](), list[Row]()
    with progress("check rows") as advance:
        for file in files:
            for where, line in numbered_lines(file.path):
                advance()
                try:
                    row, had_id = _row(file, where, line, rows.images, settings, examine, doubts, reserved)
                except UserError as fault:
                    rows.bad.append(str(fault))
                    continue
                key = (row.pictures, " ".join(row.question.split()), row.choices)
                if had_id and (first := ids.get(row.values["id"])):
                    rows.duplicates.append(f"{where}: the id '{row.values['id']}' is that of {first}")
                elif before := asked.get(key):
                    other = "" if before.answer == row.answer else f", with another answer ('{before.answer}')"
                    rows.duplicates.append(f"{where}: the same question about the same images as {before.where}{other}")
                else:
                    asked[key] = row
                    rows.good.append(row)
                    if had_id:
                        ids[row.values["id"]] = where
                    else:
                        unnamed.append(row)
    for row in unnamed:  # now that all of the user's own are known
        row.values["id"] = _unused(row.values["id"], ids)
        ids[row.values["id"]] = row.where
    rows.named = len(unnamed)
    return rows


def _row(
    file: File,
    where: str,
    line: bytes,
    images: Path,
    settings: ValidateConfig,
    examine: Callable[[bytes], ImageFacts],
    doubts: Callable[[Sample], Sequence[str]],
    reserved: Reserved | None,
) -> tuple[Row, bool]:
    """The row, and whether it had an id. UserError, one line, with what is wrong."""
    values = json_object(line, where, NEEDED)
    had_id = values.get("id") is not None and str(values["id"]).strip() != ""
    if not had_id:
        values["id"] = _new_id(Path(os.path.abspath(file.path)), images, where)
    sample = jsonl.sample_of(values, file.images, where, file.path.name)
    if faults := row_faults(sample, settings, examine, reserved):
        raise UserError(f"{where}: {'; '.join(faults)}")
    seen = [examine(data) for data in sample.images]
    row = Row(
        where=where,
        values=_moved(values, Path(os.path.relpath(os.path.realpath(file.images), os.path.realpath(images)))),
        split=file.split or _split(values, where),
        pictures=tuple(sample_pictures(sample, examine)),
        group=sample.cluster or None,
        sides=tuple((facts.width, facts.height) for facts in seen),
        question=sample.question,
        answer=sample.answer,
        target=target_text(sample),
        doubts=tuple(doubts(sample)),
        choices=tuple(sorted(sample.choices)),
    )
    return replace(row, values={**row.values, "id": sample.id}), had_id


def _require_file(file: File) -> None:
    path = file.path
    try:
        f"{path.absolute()}{file.images}".encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!r}: a name on the way there is not UTF-8, rename it") from None
    if path.is_dir():
        there = ", ".join(sorted(found.name for found in path.glob("*.jsonl"))[:5]) or "no .jsonl file"
        hint = "; a benchmark's .tsv is a source of its own, see data/README.md" if any(path.glob("*.tsv")) else ""
        raise UserError(f"{path} is a folder: name the .jsonl file in it; it has {there}{hint}")
    if path.suffix == ".tsv":
        raise UserError(f"{path} is a table: `vismem init` takes JSON lines; for VLMEvalKit's files see data/README.md")
    if not path.is_file():
        raise UserError(f"no file {path}: one JSON object per line is needed, see data/README.md")


def _common(folders: Sequence[Path]) -> Path:
    """The folder that all paths to images can start at; of several the one above, links followed as readers do."""
    given = {os.path.abspath(folder) for folder in folders}
    return Path(os.path.commonpath(map(os.path.realpath, given)) if len(given) > 1 else given.pop())


def _unused(name: str, ids: Collection[str]) -> str:
    return next(id for id in (name, *(f"{name}-{again}" for again in range(2, len(ids) + 3))) if id not in ids)


def _new_id(path: Path, images: Path, where: str) -> str:
    """An id from the file's name and the line, with its folder where files come from several."""
    name = path.relative_to(images) if path.is_relative_to(images) else Path(path.name)
    return "-".join((*name.with_suffix("").parts, where.rpartition(" ")[2]))


def _split(values: dict[str, Any], where: str) -> Split | None:
    name = values.get("split")
    if name is None:
        return None
    if not isinstance(name, str) or name not in SPLITS:
        raise UserError(f"{where}: 'split' must be one of {', '.join(SPLITS)}, got {name!r}")
    return SPLITS[name]  # type: ignore[return-value]


def _moved(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row with its paths, meant from `folder`, as seen from the folder above; absolute ones and data URIs stay."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(item) for item in value]
        if isinstance(value, dict):  # a video
            return value | {"frames": move(value["frames"])}
        return value if value.startswith(DATA_URI) else (folder / value).as_posix()

    paths = ("image", "images", "videos")
    return {key: move(value) if key in paths and value else value for key, value in values.items()}
