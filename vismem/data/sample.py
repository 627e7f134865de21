"""The one sample type: a visual question, its images and videos and what is known about its answer."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import count, islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vismem.runtime.chat import Turn, one_turn


class Capability(StrEnum):
    """The three groups of visual tasks that the paper reports (its Table 1)."""

    UNDERSTANDING = "understanding"
    REASONING = "reasoning"
    GENERATION = "generation"


@dataclass(frozen=True)
class Video:
    """A video as the frames that the model is to see, encoded files of one size (PNG or JPEG bytes) in order."""

    frames: tuple[bytes, ...]
    fps: float  # of these frames per second of the video


@dataclass(frozen=True)
class Sample:
    """One visual question. `images` are encoded files (PNG or JPEG bytes), in the order of the prompt.

    In the prompt they stand at the question's marks `<image>` where it has one for each, else before it, as videos do.
    """

    id: str
    images: tuple[bytes, ...]
    question: str
    answer: str
    choices: tuple[str, ...] = ()  # an empty one is not offered: it keeps the letters of the others, see `lettered`
    rationale: str = ""
    task: str = "vqa"
    capability: Capability = Capability.UNDERSTANDING
    source: str = ""
    scene: str = ""  # JSON: the generator's own truth about each image; empty for real data
    videos: tuple[Video, ...] = ()
    chat: tuple[Turn, ...] = ()  # the conversation, where the question is not all of it; shards hold none

    def turns(self) -> tuple[Turn, ...]:
        """The conversation, images in their places."""
        return self.chat or tuple(one_turn(self.question, len(self.images)))

    def scene_truth(self) -> Any:
        """The generator's truth, parsed; None where there is none."""
        return json.loads(self.scene) if self.scene else None

    def as_row(self) -> dict[str, Any]:
        """The sample as a row of `SCHEMA`."""
        return {name: getattr(self, name) for name in SCHEMA.names} | {"videos": [asdict(v) for v in self.videos]}


def lettered(choices: Sequence[str]) -> dict[str, str]:
    """The choices that are offered, by letter: A is the first, and one that is empty takes its letter with it."""
    return {letter: choice for letter, choice in zip(ascii_uppercase, choices, strict=False) if choice}


def option_lines(options: Mapping[str, str]) -> list[str]:
    """Options as a question shows them, one a line under its letter."""
    return [f"{letter}. {option}" for letter, option in options.items()]


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.binary())),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("rationale", pa.string()),
        ("task", pa.string()),
        ("capability", pa.string()),
        ("source", pa.string()),
        ("scene", pa.string()),
        ("videos", pa.list_(pa.struct([("frames", pa.list_(pa.binary())), ("fps", pa.float64())]))),
    ]
)


def write_shards(samples: Iterable[Sample], folder: Path, rows_per_shard: int = 4096) -> None:
    """Write samples as `part-00000.parquet`, ... (schema `SCHEMA`) into `folder`.

    An empty iterable writes one shard with no rows, so that the split exists and can be judged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = (sample.as_row() for sample in samples)
    for part in count():
        shard = list(islice(rows, rows_per_shard))
        if part and not shard:
            break
        table = pa.Table.from_pylist(shard, schema=SCHEMA)
        # Small row groups, so that reading needs little memory.
        pq.write_table(table, folder / f"part-{part:05d}.parquet", compression="zstd", row_group_size=256)


def iterate_samples(folder: Path) -> Iterator[Sample]:
    """Yield the samples of one split's folder in order. FileNotFoundError if it holds no shard."""
    shards = sorted(folder.glob("part-*.parquet"))
    if not shards:
        raise FileNotFoundError(f"no part-*.parquet in {folder}: run `vismem prepare`, or check the path")
    for shard in shards:
        for batch in pq.ParquetFile(shard).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                row["images"] = tuple(row["images"] or ())
                videos = row.get("videos") or ()  # shards of earlier versions have no such column
                row["videos"] = tuple(Video(tuple(video["frames"] or ()), video["fps"]) for video in videos)
                row["choices"] = tuple(row["choices"] or ())
                row["capability"] = Capability(row["capability"])
                yield Sample(**row)


def read_samples(folder: Path) -> list[Sample]:
    """All samples of one split's folder, in order."""
    return list(iterate_samples(folder))
