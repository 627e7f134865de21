"""NLVR v1.0 (Suhr et al., ACL 2017, CC-BY-4.0): is a human sentence true of an image of three boxes?

Reads a folder of its repository (`train/` with `train.json` and `images/DIRECTORY/train-N-M-K.png`) or a Parquet file
(id, image, question, answer, split, directory). Its identifiers leak the label (M does), so ours are hashes of them.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vismem.config import NlvrSource
from vismem.data.readers.inside import inside
from vismem.data.sample import Capability, Sample
from vismem.errors import UserError

PERMUTATIONS = 6  # orders of the three boxes that the repository draws of every example
COLUMNS = ("id", "image", "question", "answer", "directory")


def read(source: NlvrSource, split: str, seed: int) -> Iterator[Sample]:
    """Yield the examples in order if `split` is the source's; at most `source.limit`.

    In the repository's layout every box order whose image is there is an example. UserError, naming the place, for a
    missing file, image or column, an image outside the folder, a broken line and an unknown label.
    """
    if split != source.split:
        return
    if source.path.is_dir():
        rows = _repository(source)
    elif source.path.is_file():
        rows = _parquet(source)
    else:
        raise UserError(
            f"no NLVR data at {source.path}: `path` in prepare.sources must be a folder of the repository "
            f"(such as nlvr/train) or a .parquet file"
        )
    yield from islice(rows, source.limit)


def opaque_id(identifier: str) -> str:
    """A sample id that says nothing of the label."""
    return "nlvr-" + hashlib.sha256(f"nlvr {identifier}".encode()).hexdigest()[:16]


def _sample(identifier: str, image: bytes, sentence: str, label: Any, where: str) -> Sample:
    answer = str(label).strip().lower()
    if answer not in ("true", "false"):
        raise UserError(f"{where}: label {label!r} is neither 'true' nor 'false'")
    return Sample(
        id=opaque_id(identifier),
        images=(image,),
        question=f"true or false: {sentence}",
        answer=answer,
        choices=("false", "true"),
        task="nlvr",
        capability=Capability.REASONING,
        source="nlvr",
    )


def _repository(source: NlvrSource) -> Iterator[Sample]:
    folder = source.path
    # The folder's name says which file is meant; with a renamed folder the only .json does.
    named = folder / f"{folder.name}.json"
    files = [named] if named.is_file() else sorted(folder.glob("*.json"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{folder}: one .json file of examples is needed beside images/, found {found}")
    path = files[0]
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield from _example(line, path, f"{path}, line {number}", source.directories)


def _example(line: bytes, path: Path, where: str, directories: tuple[int, ...]) -> Iterator[Sample]:
    try:
        row = json.loads(line)
        identifier, directory = str(row["identifier"]), str(row["directory"])
        sentence, label = str(row["sentence"]), row["label"]
    except ValueError as error:
        raise UserError(f"{where}: broken JSON ({error}): NLVR has one object per line") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: no {error}; needed: identifier, directory, sentence, label") from None
    if directories and directory not in map(str, directories):
        return
    images = [path.parent / "images" / directory / f"{path.stem}-{identifier}-{k}.png" for k in range(PERMUTATIONS)]
    files = {image.stem: inside(path.parent, image, where) for image in images}
    there = {name: file for name, file in files.items() if file.is_file()}
    if not there:
        raise UserError(f"{where}: no image file {images[0]} (nor the other box orders): fetch the images/ folder too")
    for name, file in there.items():
        yield _sample(name, file.read_bytes(), sentence, label, where)


def _parquet(source: NlvrSource) -> Iterator[Sample]:
    try:
        file = pq.ParquetFile(source.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{source.path} is not a readable Parquet file: {error}") from None
    missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
    if missing:
        raise UserError(
            f"{source.path}: no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}. "
            f"Needed: {', '.join(COLUMNS)}"
        )
    if not pa.types.is_binary(kind := file.schema_arrow.field("image").type):
        raise UserError(f"{source.path}: column 'image' must hold the PNG's bytes (binary), it holds {kind}")
    number = 0
    for batch in file.iter_batches(batch_size=256, columns=list(COLUMNS)):
        for row in batch.to_pylist():
            number += 1
            if source.directories and str(row["directory"]) not in map(str, source.directories):
                continue
            where = f"{source.path}, row {number}"
            yield _sample(row["id"], row["image"] or b"", row["question"] or "", row["answer"], where)
