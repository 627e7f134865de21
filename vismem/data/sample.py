"""The one sample type: a visual question, its images and videos and what is known about its answer."""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import chain, count, islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from vismem.errors import UserError, first_line
from vismem.runtime.chat import Turn, one_turn

ROWS_PER_GROUP, BYTES_PER_GROUP = 256, 4_000_000  # of a shard's row group at most
CACHED_BYTES = 2**28  # of row groups that a split's reader keeps in memory


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
    source: str = ""  # the benchmark, generator or file that it is from
    part: str = ""  # the benchmark's own split that it is from, such as dev
    scene: str = ""  # JSON: the generator's own truth about each image; empty for real data
    videos: tuple[Video, ...] = ()
    cluster: str = ""  # a group that its source names, whose questions are not independent; see `vismem.data.clusters`
    chat: tuple[Turn, ...] = ()  # the conversation, where the question is not all of it; shards hold none

    def turns(self) -> tuple[Turn, ...]:
        """The conversation, images in their places."""
        return self.chat or tuple(one_turn(self.question, len(self.images)))

    def scene_truth(self) -> Any:
        """The generator's truth, parsed; None where there is none."""
        return json.loads(self.scene) if self.scene else None

    def size(self) -> int:
        """Bytes of its images and frames."""
        return sum(map(len, (*self.images, *(frame for video in self.videos for frame in video.frames))))

    def as_row(self) -> dict[str, Any]:
        """The sample as a row of `SCHEMA`."""
        return {name: getattr(self, name) for name in SCHEMA.names} | {"videos": [asdict(v) for v in self.videos]}


def lettered(choices: Sequence[str]) -> dict[str, str]:
    """The choices that are offered, by letter: A is the first, and one that is empty takes its letter with it.

    Behind Z stand the numbers from 27 on, by which an answer cannot name them.
    """
    labels = chain(ascii_uppercase, map(str, count(len(ascii_uppercase) + 1)))
    return {label: choice for label, choice in zip(labels, choices, strict=False) if choice}


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
        ("part", pa.string()),
        ("scene", pa.string()),
        ("videos", pa.list_(pa.struct([("frames", pa.list_(pa.binary())), ("fps", pa.float64())]))),
        ("cluster", pa.string()),
    ]
)


def write_shards(samples: Iterable[Sample], folder: Path, rows_per_shard: int = 4096) -> None:
    """Write samples as `part-00000.parquet`, ... (schema `SCHEMA`) into `folder`; a row group is in memory at once.

    An empty iterable writes one shard with no rows, so that the split exists and can be judged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rest = iter(samples)
    for part in count():
        first = next(rest, None)
        if part and first is None:
            break
        shard = chain([first] if first else [], islice(rest, rows_per_shard - 1))
        with pq.ParquetWriter(folder / f"part-{part:05d}.parquet", SCHEMA, compression="zstd") as file:
            for group in _groups(shard):
                file.write_table(pa.Table.from_pylist(group, schema=SCHEMA))


def _groups(samples: Iterable[Sample]) -> Iterator[list[dict[str, Any]]]:
    """Rows by row group, one without rows where there are none."""
    rows, size, empty = list[dict[str, Any]](), 0, True
    for sample in samples:
        rows, size, empty = [*rows, sample.as_row()], size + sample.size(), False
        if len(rows) == ROWS_PER_GROUP or size >= BYTES_PER_GROUP:
            yield rows
            rows, size = [], 0
    if rows or empty:
        yield rows


def shard_tables(shard: Path) -> Iterator[pa.Table]:
    """The row groups of a shard in order, one in memory at once."""
    with pq.ParquetFile(shard) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, use_threads=False)


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a row group in order."""
    return (table.slice(row, 1).to_pylist()[0] for row in range(len(table)))


class StoredSamples(Sequence[Sample]):
    """The samples of one split's folder, in order, read from its shards as they are asked for.

    The row groups that were read last stay in memory, CACHED_BYTES of them. UserError if the folder holds no shard, and
    for a damaged one.
    """

    def __init__(self, folder: Path, places: Sequence[int] | None = None) -> None:
        """`places`: only these rows of the split, in this order; None: all."""
        shards = sorted(folder.glob("part-*.parquet"))
        if not shards:
            raise UserError(f"no part-*.parquet in {folder}: run `vismem prepare`, or check the path")
        self._groups, self._ends, end = list[tuple[Path, int]](), list[int](), 0
        for shard in shards:
            with _told(shard):
                metadata = pq.read_metadata(shard)
            for group in range(metadata.num_row_groups):
                end += metadata.row_group(group).num_rows
                self._groups.append((shard, group))
                self._ends.append(end)
        self._places = range(end) if places is None else places
        self._read: dict[int, pa.Table] = {}  # by group, the last used last

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        """One sample, or the list of a slice's."""
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        row = self._places[place]
        group = bisect_right(self._ends, row)
        start = self._ends[group - 1] if group else 0
        return _sample(self._table(group).slice(row - start, 1).to_pylist()[0])

    def share(self, count: int) -> "StoredSamples":
        """So many of them, or all, in order: of each source its first, as many as are its share."""
        whole = list[str]()
        for shard in dict.fromkeys(shard for shard, _ in self._groups):
            with _told(shard), pq.ParquetFile(shard) as file:
                whole += file.read(columns=["source"], use_threads=False)["source"].to_pylist()
        sources, seen, depths = [whole[place] for place in self._places], Counter[str](), list[float]()
        sizes = Counter(sources)
        for source in sources:
            seen[source] += 1
            depths.append((seen[source] - 0.5) / sizes[source])  # how far down its source it is
        chosen, first = copy(self), sorted(range(len(self)), key=depths.__getitem__)[:count]
        chosen._places = [self._places[at] for at in sorted(first)]
        return chosen

    def _table(self, group: int) -> pa.Table:
        table = self._read.pop(group, None)
        if table is None:
            shard, number = self._groups[group]
            with _told(shard), pq.ParquetFile(shard) as file:
                table = file.read_row_group(number, use_threads=False)
        self._read[group] = table
        while len(self._read) > 1 and sum(kept.nbytes for kept in self._read.values()) > CACHED_BYTES:
            self._read.pop(next(iter(self._read)))
        return table


@contextmanager
def _told(shard: Path) -> Iterator[None]:
    """A block in which what pyarrow raises for a damaged shard is a UserError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shard} is damaged ({first_line(error)}): run the step that wrote it again") from None


def _sample(row: dict[str, Any]) -> Sample:
    row["images"] = tuple(row["images"] or ())
    videos = row.get("videos") or ()  # shards of earlier versions have no such column
    row["videos"] = tuple(Video(tuple(video["frames"] or ()), video["fps"]) for video in videos)
    row["choices"] = tuple(row["choices"] or ())
    row["capability"] = Capability(row["capability"])
    return Sample(**row)


def read_samples(folder: Path) -> list[Sample]:
    """All samples of one split's folder, in order."""
    return list(StoredSamples(folder))
