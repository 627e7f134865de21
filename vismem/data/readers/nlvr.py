"""NLVR v1.0 (Suhr et al., ACL 2017, CC-BY-4.0): is a human sentence true of an image of three boxes?

Reads a folder of its repository (`train/` with `train.json` and `images/DIRECTORY/train-N-M-K.png`) or Parquet files
(id, image, question, answer, split, directory). Its identifiers leak the label (M does), so ours are hashes of them.
"""

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vismem.config import NlvrSource
from vismem.data.readers.files import inside, json_lines, require_columns
from vismem.data.sample import Capability, Sample
from vismem.errors import UserError

PERMUTATIONS = 6  # orders of the three boxes that the repository draws of every example
COLUMNS = ("id", "image", "question", "answer", "directory")


def read(source: NlvrSource) -> Iterator[Sample]:
    """The examples in order. In the repository's layout every box order whose image is there is an example.

    UserError, naming the place, for a missing file, image or column, an image outside the folder, a broken line and an
    unknown label.
    """
    if source.path.is_dir():
        return _repository(source)
    if files := parquet_files(source.path):
        return chain.from_iterable(_parquet(source, file) for file in files)
    raise UserError(
        f"no NLVR data at {source.path}: `path` in prepare.sources must be a folder of the repository "
        f"(such as nlvr/train) or a .parquet file"
    )


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or those in place of a folder: `train.parquet` and `train_rest.parquet` for `train`."""
    return [path] if path.is_file() else sorted(path.parent.glob(f"{path.name}*.parquet"))


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
        cluster=identifier.rsplit("-", 2)[0],  # the presentation: four examples of one sentence, in any box order
    )


def _is_wanted(source: NlvrSource, directory: Any) -> bool:
    return not source.directories or str(directory) in map(str, source.directories)


def _repository(source: NlvrSource) -> Iterator[Sample]:
    folder = source.path
    # The folder's name says which file is meant; with a renamed folder the only .json does.
    named = folder / f"{folder.name}.json"
    files = [named] if named.is_file() else sorted(folder.glob("*.json"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{folder}: one .json file of examples is needed beside images/, found {found}")
    for where, row in json_lines(files[0], ("identifier", "directory", "sentence", "label")):
        if _is_wanted(source, row["directory"]):
            name = f"{files[0].stem}-{row['identifier']}"
            images = [folder / "images" / str(row["directory"]) / f"{name}-{k}.png" for k in range(PERMUTATIONS)]
            targets = {image.stem: inside(folder, image, where) for image in images}
            there = {stem: target for stem, target in targets.items() if target.is_file()}
            if not there:
                others = "(nor the other box orders): fetch the images/ folder too"
                raise UserError(f"{where}: no image file {images[0]} {others}")
            for stem, target in there.items():
                yield _sample(stem, target.read_bytes(), row["sentence"], row["label"], where)


def _parquet(source: NlvrSource, path: Path) -> Iterator[Sample]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None
    require_columns(path, COLUMNS, file.schema_arrow.names)
    if not pa.types.is_binary(kind := file.schema_arrow.field("image").type):
        raise UserError(f"{path}: column 'image' must hold the PNG's bytes (binary), it holds {kind}")
    batches = file.iter_batches(batch_size=256, columns=list(COLUMNS))
    for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
        if _is_wanted(source, row["directory"]):
            where = f"{path}, row {number}"
            yield _sample(str(row["id"]), row["image"] or b"", row["question"] or "", row["answer"], where)
