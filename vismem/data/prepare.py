"""The step `prepare`: the sources named in the parameters become Parquet shards a split, and `stats.json`."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vismem.config import Config, EasyVqaSource, JsonlSource, LmuDataSource, NlvrSource, ScenesSource
from vismem.data import scenes
from vismem.data.fingerprint import SPLITS, ImageCache, data_sha256, sample_sha256, seen_sha256
from vismem.data.readers import easy_vqa, jsonl, lmudata, nlvr
from vismem.data.sample import Sample, write_shards
from vismem.files import write_json
from vismem.progress import Advance, progress

TOP_ANSWERS = 20
# By the class of a source: its samples for one split, in a fixed order, from (source, split, seed).
READERS: dict[type, Callable[[Any, str, int], Iterator[Sample]]] = {
    EasyVqaSource: easy_vqa.read,
    JsonlSource: jsonl.read,
    LmuDataSource: lmudata.read,
    NlvrSource: nlvr.read,
    ScenesSource: scenes.generate,
}


def prepare(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Write `out/<split>/part-*.parquet` for the three splits and `out/stats.json`; return one line of what was made.

    Deterministic from `config.seed`. No image (by its pixels) is in two splits: a row whose image an earlier split of
    test, validation, train already has is dropped and counted in `stats.json`.
    Raises UserError where a source cannot be read.
    """
    splits = {split: _SplitStats() for split in SPLITS}
    images = _ImageOwners()
    with progress("prepare rows") as advance:
        for split, stats in splits.items():
            shutil.rmtree(out / split, ignore_errors=True)  # of a killed run
            write_shards(_rows(config, split, stats, images, advance), out / split, config.prepare.rows_per_shard)
    whole = data_sha256({split: stats.digests for split, stats in splits.items()})
    summary = {"data_sha256": whole, "seed": config.seed, "splits": {s: stats.summary() for s, stats in splits.items()}}
    write_json(out / "stats.json", summary)
    dropped = sum(sum(stats.dropped.values()) for stats in splits.values())
    sizes = ", ".join(f"{stats.rows} {split}" for split, stats in splits.items())
    tail = f"; {dropped} rows dropped, their image is in another split" if dropped else ""
    return f"prepared {sizes} rows{tail}; data {whole[:12]}"


@dataclass
class _SplitStats:
    """What is counted of one split while it streams by."""

    rows: int = 0
    images: set[bytes] = field(default_factory=set)
    tasks: Counter[str] = field(default_factory=Counter)
    capabilities: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)  # by the split that has the image
    digests: list[bytes] = field(default_factory=list)

    def add(self, sample: Sample, hashes: list[bytes]) -> None:
        self.rows += 1
        self.images.update(hashes)
        self.tasks[sample.task] += 1
        self.capabilities[sample.capability.value] += 1
        self.sources[sample.source] += 1
        self.answers[sample.answer] += 1
        self.digests.append(sample_sha256(sample.as_row()))

    def summary(self) -> dict[str, Any]:
        """The plain figures of `stats.json`, in a stable order."""
        top = sorted(self.answers.items(), key=lambda item: (-item[1], item[0]))[:TOP_ANSWERS]
        return {
            "rows": self.rows,
            "images": len(self.images),
            "tasks": dict(sorted(self.tasks.items())),
            "capabilities": dict(sorted(self.capabilities.items())),
            "sources": dict(sorted(self.sources.items())),
            "answers": dict(top),
            "distinct_answers": len(self.answers),
            "dropped": dict(sorted(self.dropped.items())),
        }


class _ImageOwners:
    """Which split each image belongs to: the first, in order of precedence, that shows it."""

    def __init__(self) -> None:
        self._facts = ImageCache()
        self._owner: dict[bytes, str] = {}

    def claim(self, sample: Sample, split: str) -> tuple[list[bytes], str | None]:
        """The hashes of a sample's images and videos, and the other split that has one already (None: it is ours).

        Images that do not decode are nobody's: their rows go on to `validate`, which quarantines them.
        """
        videos = [[self._facts(data) for data in video.frames] for video in sample.videos]
        hashes = seen_sha256([self._facts(data) for data in sample.images], videos)
        other = next((owner for h in hashes if (owner := self._owner.get(h, split)) != split), None)
        if other is None:
            self._owner.update(dict.fromkeys(hashes, split))
        return hashes, other


def _rows(config: Config, split: str, stats: _SplitStats, images: _ImageOwners, advance: Advance) -> Iterator[Sample]:
    """The split's rows of all sources in order, counted in `stats`; rows whose image another split has are dropped."""
    for source in config.prepare.sources:
        for sample in READERS[type(source)](source, split, config.seed):
            hashes, other = images.claim(sample, split)
            if other is None:
                stats.add(sample, hashes)
                advance(split=split)
                yield sample
            else:
                stats.dropped[other] += 1
