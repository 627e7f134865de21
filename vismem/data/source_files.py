"""The files that steps read from outside `data/`, and a record of them there, so that DVC notices when they change."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from vismem.config import Config, DvcSource, JsonlSource, LmuDataSource, LocalFiles, NlvrSource
from vismem.data.dvc_source import COMMIT, find
from vismem.data.readers.jsonl import named_files
from vismem.data.readers.lmudata import VARIABLE
from vismem.data.readers.nlvr import parquet_files
from vismem.files import read_json, write_json

DATA = Path("data")  # what dvc.yaml lets `prepare`, `validate` and `base` depend on
ASSETS = Path("assets")  # what `base` depends on too
RECORD = DATA / "outside.json"


def files_of(source: Any) -> list[Path]:
    """The files that a source reads, as far as they are there; one that is generated or in a package has none."""
    places: list[Path] = []
    if isinstance(source, JsonlSource):
        places = [source.path, *named_files(source)]
    elif isinstance(source, NlvrSource):
        places = [source.path, *parquet_files(source.path)]
    elif isinstance(source, LmuDataSource) and (given := source.path or os.environ.get(VARIABLE)):
        folder = Path(given)
        places = [folder / f"{source.name}.tsv", folder / f"{source.name}_local.tsv", folder / "images" / source.name]
    return _files_at(*places)


def source_bytes(config: Config) -> int:
    """The size of all files of the sources, as far as they are there."""
    return sum(file.stat().st_size for source in config.prepare.sources for file in files_of(source))


def train_questions(config: Config) -> int | None:
    """How many questions train a run, by parameters and files of JSON lines; None where other files train it too."""
    count = 0
    for source in config.prepare.sources:
        if isinstance(source, JsonlSource) and source.split == "train" and source.path.is_file():
            with source.path.open("rb") as lines:
                count += sum(1 for line in islice(filter(bytes.strip, lines), source.limit))
        elif any(part.split == "train" for part in _local(source)):
            return None
        count += getattr(source, "train", 0)  # of one that is generated
    return count


def _local(source: Any) -> Sequence[Any]:
    return source.sources if isinstance(source, DvcSource) else [source] * isinstance(source, LocalFiles)


def rule_files(config: Config) -> list[Path]:
    """The files that `validate` takes its user's rules from, as far as they are there."""
    named = (config.validate_.expectations, *config.validate_.plugins, config.validate_.task_profile)
    return [file for file in named if file and file.is_file()]


def fingerprint(files: Iterable[Path]) -> str:
    """Hex sha256 over names, sizes and times of files; they are not opened. One that has gone meanwhile is left out."""
    lines = list[str]()
    for file in files:
        with suppress(FileNotFoundError):
            stat = file.stat()
            lines.append(f"{file.as_posix()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def record_outside(config: Config) -> None:
    """Write fingerprints of what is read from outside `data/` into `data/outside.json`, in the working folder.

    That is sources, rules, and a base that is a folder. Of what DVC keeps under a name that can move, such as a branch,
    it is the md5. The stages that read them depend on `data/`, so they run again where one has changed. What other
    profiles read stays in it, and what is not there; without any outside there is no such file.
    """
    found = {}
    for source in config.prepare.sources:
        if isinstance(source, DvcSource):
            if not COMMIT.fullmatch(source.rev):
                found[f"dvc {source.path} at {source.rev} of {source.repo}"] = find(source).md5
            continue
        files = [file.resolve() for file in files_of(source)]
        outside = [file for file in files if not file.is_relative_to(DATA.resolve())]
        if outside:
            named = (source.kind, *(str(getattr(source, key, "") or "") for key in ("name", "path")))
            found[" ".join(filter(None, named))] = fingerprint(outside)
    rules = [file.resolve() for file in rule_files(config)]
    if outside := [file for file in rules if not file.is_relative_to(DATA.resolve())]:
        found["rules of validate"] = fingerprint(outside)
    model = Path(config.base.model).resolve()
    if model.is_dir() and not model.is_relative_to(ASSETS.resolve()):
        found[f"base {model}"] = fingerprint(file.resolve() for file in _files_at(model))
    if found:
        known = read_json(RECORD) if RECORD.is_file() else {}
        DATA.mkdir(exist_ok=True)
        write_json(RECORD, known | found)


def _files_at(*places: Path) -> list[Path]:
    """The files among the places, and in those that are folders."""
    found = (file for place in places for file in (place.rglob("*") if os.path.isdir(place) else [place]))
    return sorted({file for file in found if os.path.isfile(file)})  # of os: a name may be too long for one
