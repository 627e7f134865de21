"""Benchmark files as VLMEvalKit keeps them on disk (`$LMUData/NAME.tsv`): the paper's suites for large models.

Tab-separated, one question per row. `image` is base64, a list of base64, or the index of the row that has the image;
`image_path` names files below the folder. Columns A to Z are the options, which stand under their letters in the
question; an empty column is no option, and the others keep their letters. Text that names images, `<image 2>`, or
`<image>` for the next one, holds them there: one that is named twice is given twice, those never named come first.
"""

import ast
import csv
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from string import ascii_uppercase
from typing import BinaryIO

from vismem.config import LmuDataSource
from vismem.data.benchmarks import BY_FILE, in_every_order, lists_texts
from vismem.data.readers.files import inside, not_utf8, require_columns
from vismem.data.sample import Capability, Sample, lettered, option_lines
from vismem.errors import UserError
from vismem.runtime.chat import MARK
from vismem.runtime.images import decoded_base64

VARIABLE = "LMUData"  # of the environment, VLMEvalKit's own
ORDERS = 1_000_000  # VLMEvalKit adds so much, or twice and so on, to the index of a question in another order
LONGEST_INDEX = 64  # characters; a longer `image` is an image
NAMED = re.compile(r"<image(?: (?P<number>\d{1,4}))?>")

Row = Mapping[str, str]


def read(source: LmuDataSource, judged: bool = False) -> Iterator[Sample]:
    """Yield the questions in order, those without an answer too: `validate` counts them. `judged`: there is a judge.

    Of MMBench and others whose files ask a question in several orders of its options, the first is read.

    UserError, naming the place, for a missing file or folder, a benchmark that needs a judge or whose answers are lists
    of texts (but MMMU's), a missing column, text that is not UTF-8, and an image that cannot be read or is outside the
    folder.
    """
    if not judged and source.name in BY_FILE and BY_FILE[source.name].judge:
        raise UserError(f"prepare.sources: a judge model scores {source.name}: see `vismem evaluate --suite`")
    path = _file(source)
    named, originals = set[str](), set[str]()
    for row in _rows(path):
        if (held := _held(row)) and len(held) <= LONGEST_INDEX:
            named.add(held)
        if in_every_order(source.name):
            originals.add(row["index"])
    with tempfile.TemporaryFile() as kept:  # a file may be gigabytes
        shared = Shared(kept)
        for row in _rows(path) if named else ():
            if row["index"] in named:
                shared.keep(row["index"], _images(row, source, path, shared))
        yield from (_sample(row, source, path, shared) for row in _rows(path) if _reordered(row) not in originals)


class Shared:
    """The images of rows that others name, kept in a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._places = file, dict[str, list[tuple[int, int]]]()

    def keep(self, index: str, images: Iterable[bytes]) -> None:
        """Keep the images of the row `index`."""
        self._file.seek(0, os.SEEK_END)
        self._places[index] = [(self._file.tell(), self._file.write(image)) for image in images]

    def of(self, index: str) -> Iterator[bytes]:
        """The images of the row `index`. KeyError where none were kept."""
        for place, size in self._places[index]:
            self._file.seek(place)
            yield self._file.read(size)


def folder_of(path: Path | None, named: str) -> Path:
    """The folder of benchmark files: `path`, or the environment's. UserError, saying what `named` it, for none."""
    given = path or os.environ.get(VARIABLE)
    folder = Path(given or "")
    if not given or not folder.is_dir():
        raise UserError(
            f"{named}: no folder {folder}: name the one that holds the .tsv files there, or set {VARIABLE} to it"
        )
    return folder


def _file(source: LmuDataSource) -> Path:
    folder = folder_of(source.path, f"path of prepare.sources lmudata {source.name}")
    for path in (folder / f"{source.name}.tsv", folder / f"{source.name}_local.tsv"):
        if path.is_file():
            return path
    there = ", ".join(sorted(file.stem for file in folder.glob("*.tsv"))) or "no .tsv file"
    raise UserError(f"no {folder / source.name}.tsv: download it with VLMEvalKit; {folder} has {there}")


def _rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # images are fields
    with path.open(newline="", encoding="utf-8-sig") as lines:
        table = csv.DictReader(lines, delimiter="\t", strict=True)
        try:
            require_columns(path, ("index", "question", "answer"), table.fieldnames or ())
            for row in table:
                if None in row or None in row.values():
                    raise UserError(f"{path}, line {table.line_num}: a row of other columns than the header's")
                yield row
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, behind line {table.line_num}: {not_utf8(error)}") from None
        except csv.Error as error:
            raise UserError(f"{path}, line {table.reader.line_num}: no tab-separated table ({error})") from None


def _reordered(row: Row) -> str | None:
    """The index of the question that the row would ask in another order, as VLMEvalKit numbers them."""
    index = row["index"]
    original = row.get("g_index") or (str(int(index) % ORDERS) if index.isdecimal() else index)
    return original if original != index else None


def _sample(row: Row, source: LmuDataSource, path: Path, shared: Shared) -> Sample:
    choices = [row.get(letter, "") for letter in ascii_uppercase]
    while choices and not choices[-1]:
        choices.pop()
    about = "\n".join(part for part in (row.get("hint", ""), row["question"]) if part)
    (text, *shown), images = place_images([about, *choices], _images(row, source, path, shared))
    numbers = count(1 + text.count(MARK))
    sample = Sample(
        id=f"{source.name}-{row['index']}",
        images=images,
        question="\n".join((text, *option_lines(lettered(shown)))),
        answer=reference(row),
        choices=tuple(re.sub(MARK, lambda _: f"image {next(numbers)}", choice) for choice in shown),
        task=row.get("category") or source.name,
        capability=BY_FILE[source.name].capability if source.name in BY_FILE else Capability.UNDERSTANDING,
        source=source.name,
        part=row.get("split", "").strip(),
    )
    if lists_texts(sample):
        raise UserError(
            f"{path}, row {row['index']}: the answer is a list, and {source.name} counts those by a rule of its own: "
            "make a .jsonl source of it with one answer for each question"
        )
    return sample


def reference(row: Row) -> str:
    """The answer; of MathVista's choices, as VLMEvalKit has it, the letter: their texts may be letters themselves."""
    lettered_choice = row.get("question_type") == "multi_choice" and row.get("answer_option", "").strip()
    return lettered_choice or row["answer"].strip()


def place_images(texts: Sequence[str], images: tuple[bytes, ...]) -> tuple[list[str], tuple[bytes, ...]]:
    """The texts with `MARK` wherever they name an image, and the images in the order of the marks.

    A name without an image is text. Where no image is named, the images stay as they are.
    """
    unnamed, placed = [*range(len(images))], list[bytes]()

    def mark(name: re.Match[str]) -> str:
        place = int(name["number"]) - 1 if name["number"] else next(iter(unnamed), -1)
        if not 0 <= place < len(images):
            return name[0].strip("<>")
        if place in unnamed:
            unnamed.remove(place)
        placed.append(images[place])
        return MARK

    marked = [NAMED.sub(mark, text) for text in texts]
    if not placed:
        return marked, images
    marked[0] = MARK * len(unnamed) + marked[0]
    return marked, (*(images[place] for place in unnamed), *placed)


def _images(row: Row, source: LmuDataSource, path: Path, shared: Shared) -> tuple[bytes, ...]:
    held, where = _held(row), f"{path}, row {row['index']}"
    try:
        if held and len(held) <= LONGEST_INDEX:
            return tuple(shared.of(held))
        if held:
            return tuple(map(decoded_base64, _listed(held)))
        names = _listed(row.get("image_path", "").strip())
        files = [inside(path.parent, path.parent / "images" / source.name / name, where) for name in names]
        return tuple(file.read_bytes() for file in files)
    except KeyError:
        raise UserError(f"{where}: `image` names row {held}, which is not there or has no image itself") from None
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{where}: `image` is neither base64 nor a list of it: {error}") from None
    except OSError as error:
        raise UserError(
            f"{where}: {str(error.filename)[:200]}: {error.strerror}; put the images where VLMEvalKit does"
        ) from None


def _held(row: Row) -> str:
    return row.get("image", "").strip()


def _listed(text: str) -> list[str]:
    """One entry, or those of a list literal."""
    if text.startswith("["):
        return [str(entry) for entry in ast.literal_eval(text)]
    return [text] if text else []
