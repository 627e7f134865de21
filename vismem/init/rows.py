"""The rows of a user's files, checked one by one: what is good, and what is wrong with the others."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vismem.config import ValidateConfig
from vismem.config.data import Split
from vismem.data.fingerprint import image_cache, sample_pictures
from vismem.data.parallel import in_order
from vismem.data.readers import jsonl
from vismem.data.readers.files import json_object, numbered_lines
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.progress import progress
from vismem.runtime.images import DATA_URI
from vismem.runtime.reserved import Reserved
from vismem.validation.rows import row_faults

HOPELESS = 2_000  # bad rows, and none good before them: the file holds something else
PARQUET = b"PAR1"  # a table's first bytes
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
    sample: Sample  # without its images and videos
    pictures: tuple[bytes, ...]  # images and videos by their pixels, hashes
    sides: tuple[tuple[int, int], ...]  # width and height of each image, pixels
    doubts: tuple[str, ...] = ()  # why the base cannot read it


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
    that cannot be read, and where the first HOPELESS rows are bad; what is wrong with a row is counted.
    """
    for file in files:
        _require_file(file)
    rows, examine = Rows(_common([file.images for file in files])), image_cache(settings.max_pixels)
    read = list[Row]()

    def checked(file: File, where: str, line: bytes) -> Row:
        values, sample = _parsed(file, where, line, rows.images)
        if faults := row_faults(sample, settings, examine, reserved):
            raise UserError(f"{where}: {'; '.join(faults)}")
        split, seen = file.split or _split(values, where), [examine(data) for data in sample.images]
        pictures, sides = tuple(sample_pictures(sample, examine)), tuple((facts.width, facts.height) for facts in seen)
        return Row(where, values, split, replace(sample, images=(), videos=()), pictures, sides, tuple(doubts(sample)))

    def tried(line: tuple[File, str, bytes]) -> Row | str:
        try:
            return checked(*line)
        except UserError as fault:
            return str(fault)

    lines = ((file, where, line) for file in files for where, line in numbered_lines(file.path))
    with progress("check rows") as advance:
        for found in in_order(tried, lines):
            advance()
            if isinstance(found, Row):
                read.append(found)
                continue
            rows.bad.append(found)
            if len(rows.bad) == HOPELESS and not read:
                raise UserError(f"none of the first {HOPELESS:,} rows is good: {'; '.join(rows.bad[:3])}")
    rows.good, rows.duplicates = _without_repeats(read)
    rows.named = _give_ids(rows.good)
    return rows


def _parsed(file: File, where: str, line: bytes, images: Path) -> tuple[dict[str, Any], Sample]:
    """`Row.values`, in which the id is empty where there is none, and the sample. UserError with what is wrong."""
    values = json_object(line, where, NEEDED)
    has_id = values.get("id") is not None and str(values["id"]).strip() != ""
    own = values["id"] if has_id else _new_id(Path(os.path.abspath(file.path)), images, where)
    sample = jsonl.sample_of(values | {"id": own}, file.images, where, file.path.name)
    folder = Path(os.path.relpath(os.path.realpath(file.images), os.path.realpath(images)))
    return _moved(values, folder) | {"id": sample.id if has_id else ""}, sample


def _without_repeats(read: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows that were not there before, and a line for each of the others."""
    ids, asked, good, repeated = dict[str, str](), dict[tuple[object, ...], Row](), list[Row](), list[str]()
    for row in read:
        question, own = " ".join(row.sample.question.split()), row.values["id"]
        key = (row.pictures, question, tuple(sorted(row.sample.choices)))
        if own and own in ids:
            repeated.append(f"{row.where}: the id '{own}' is that of {ids[own]}")
        elif before := asked.get(key):
            answer = before.sample.answer
            other = "" if answer == row.sample.answer else f", with another answer ('{answer}')"
            repeated.append(f"{row.where}: the same question about the same images as {before.where}{other}")
        else:
            asked[key], ids[own] = row, row.where
            good.append(row)
    return good, repeated


def _give_ids(rows: Sequence[Row]) -> int:
    """Give an id to rows that have none, which none of the user's own is; how many."""
    unnamed = [row for row in rows if not row.values["id"]]
    ids = {row.values["id"] for row in rows}
    for row in unnamed:
        row.values["id"] = _unused(row.sample.id, ids)
        ids.add(row.values["id"])
    return len(unnamed)


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
    with path.open("rb") as opened:
        if opened.read(len(PARQUET)) == PARQUET:
            raise UserError(
                f"{path} is a Parquet table: `vismem init` takes JSON lines; data/README.md has the Python that writes "
                "them, and the images as files"
            )


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
