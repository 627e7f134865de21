"""Benchmark files as VLMEvalKit keeps them on disk (`$LMUData/NAME.tsv`): the paper's suites for large models.

Tab-separated, one question per row. `image` is base64, a list of base64, or the index of the row that has the image;
`image_path` names files below the folder. Columns A to Z are the options, which stand under their letters in the
question; an empty column is no option, and the others keep their letters.
"""

import ast
import base64
import csv
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import ascii_uppercase

from vismem.config import LmuDataSource
from vismem.data.readers.files import inside, require_columns
from vismem.data.sample import Capability, Sample, lettered, option_lines
from vismem.errors import UserError

VARIABLE = "LMUData"  # of the environment, VLMEvalKit's own
LONGEST_INDEX = 64  # characters; a longer `image` is an image

# Benchmarks of the paper's Table 1 with such a file, and the capability it counts them to.
CAPABILITIES = {
    **dict.fromkeys(("MMStar", "MMT-Bench_VAL", "BLINK", "MUIRBench"), Capability.UNDERSTANDING),
    **dict.fromkeys(("MMMU_DEV_VAL", "LogicVista", "MathVista_MINI"), Capability.REASONING),
    "HallusionBench": Capability.GENERATION,
}
JUDGED = ("MMVet",)  # scored by a judge model, which is not here

Row = Mapping[str, str]


def read(source: LmuDataSource) -> Iterator[Sample]:
    """Yield the answered questions in order.

    UserError, naming the place, for a missing file or folder, a benchmark that needs a judge, a missing column and an
    image that cannot be read or is outside the folder. HallusionBench counts single answers (aAcc).
    """
    if source.name in JUDGED:
        raise UserError(f"prepare.sources lmudata: {source.name} is scored by a judge model, which is not here")
    path = _file(source)
    named = {held for row in _rows(path) if (held := _held(row)) and len(held) <= LONGEST_INDEX}
    rows = _rows(path) if named else ()  # a file may be gigabytes
    shared = {row["index"]: _images(row, source, path, {}) for row in rows if row["index"] in named}
    yield from (_sample(row, source, path, shared) for row in _rows(path) if row["answer"].strip())


def _file(source: LmuDataSource) -> Path:
    given = source.path or os.environ.get(VARIABLE)
    folder = Path(given or "")
    if not given or not folder.is_dir():
        raise UserError(
            f"prepare.sources lmudata {source.name}: no folder {folder}: give `path`, or set {VARIABLE}, to the folder "
            "that holds the .tsv files"
        )
    for path in (folder / f"{source.name}.tsv", folder / f"{source.name}_local.tsv"):
        if path.is_file():
            return path
    there = ", ".join(sorted(file.stem for file in folder.glob("*.tsv"))) or "no .tsv file"
    raise UserError(f"no {folder / source.name}.tsv: download it with VLMEvalKit; {folder} has {there}")


def _rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # images are fields
    with path.open(newline="", encoding="utf-8") as lines:
        table = csv.DictReader(lines, delimiter="\t", restval="")
        require_columns(path, ("index", "question", "answer"), table.fieldnames or ())
        yield from table


def _sample(row: Row, source: LmuDataSource, path: Path, shared: Mapping[str, tuple[bytes, ...]]) -> Sample:
    choices = [row.get(letter, "") for letter in ascii_uppercase]
    while choices and not choices[-1]:
        choices.pop()
    parts = [row.get("hint", ""), row["question"], *option_lines(lettered(choices))]
    return Sample(
        id=f"{source.name}-{row['index']}",
        images=_images(row, source, path, shared),
        question="\n".join(part for part in parts if part),
        answer=row["answer"].strip(),
        choices=tuple(choices),
        task=row.get("category") or source.name,
        capability=CAPABILITIES.get(source.name, Capability.UNDERSTANDING),
        source=source.name,
    )


def _images(row: Row, source: LmuDataSource, path: Path, shared: Mapping[str, tuple[bytes, ...]]) -> tuple[bytes, ...]:
    held, where = _held(row), f"{path}, row {row['index']}"
    try:
        if held and len(held) <= LONGEST_INDEX:
            return shared[held]
        if held:
            return tuple(base64.b64decode(image, validate=True) for image in _listed(held))
        names = _listed(row.get("image_path", "").strip())
        files = [inside(path.parent, path.parent / "images" / source.name / name, where) for name in names]
        return tuple(file.read_bytes() for file in files)
    except KeyError:
        raise UserError(f"{where}: `image` names row {held}, which is not there or has no image itself") from None
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{where}: `image` is neither base64 nor a list of it: {error}") from None
    except OSError as error:
        raise UserError(f"{where}: {error.filename}: {error.strerror}; put the images where VLMEvalKit does") from None


def _held(row: Row) -> str:
    return row.get("image", "").strip()


def _listed(text: str) -> list[str]:
    """One entry, or those of a list literal."""
    if text.startswith("["):
        return [str(entry) for entry in ast.literal_eval(text)]
    return [text] if text else []
