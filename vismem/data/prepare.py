"""The step `prepare`: the sources named in the parameters become Parquet shards per split, and `stats.json`."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from vismem.config import Config
from vismem.data.benchmarks import counted
from vismem.data.clusters import claim, tied
from vismem.data.dvc_source import fetched
from vismem.data.fingerprint import SPLITS, ImageFacts, data_sha256, image_cache, sample_sha256
from vismem.data.instructions import instructed
from vismem.data.parallel import in_order
from vismem.data.readers import read
from vismem.data.revisions import write_revisions
from vismem.data.sample import Sample, write_shards
from vismem.files import write_json
from vismem.progress import Advance, progress


def prepare(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Write `out/<split>/part-*.parquet` for the three splits and `out/stats.json`; return one line of what was made.

    Deterministic from `config.seed`. No image (by its pixels) and no group is in two splits: a row whose image or group
    an earlier split of test, validation, train already has is dropped and counted in `stats.json`.
    Sources that DVC keeps are fetched first, and their revisions are in `revisions.json`.
    Raises UserError where a source cannot be read.
    """
    config, revisions = fetched(config)
    examine, owners = image_cache(), dict[str, str]()
    splits = {split: _Split(split, examine, owners) for split in SPLITS}
    with progress("prepare rows") as advance:
        for name, split in splits.items():
            shutil.rmtree(out / name, ignore_errors=True)  # of a killed run
            write_shards(_rows(config, split, advance), out / name, config.prepare.rows_per_shard)
    whole = data_sha256({name: split.digests for name, split in splits.items()})
    counts = {n: {"rows": len(of.digests), "dropped": dict(sorted(of.dropped.items()))} for n, of in splits.items()}
    write_json(out / "stats.json", {"data_sha256": whole, "seed": config.seed, "splits": counts})
    write_revisions(out, revisions)
    dropped = sum((split.dropped for split in splits.values()), Counter[str]())
    sizes = ", ".join(f"{len(split.digests)} {name}" for name, split in splits.items())
    elsewhere, parts = (sum(n for why, n in dropped.items() if (why in SPLITS) == known) for known in (True, False))
    tail = f"; {elsewhere} rows dropped, their image or group is in another split" if elsewhere else ""
    tail += f"; {parts} rows left out, they are of a part that is not counted" if parts else ""
    return f"prepared {sizes} rows{tail}; data {whole[:12]}"


@dataclass
class _Split:
    """One split while it streams by: which rows it may have, and what is counted of them."""

    name: str
    examine: Callable[[bytes], ImageFacts]
    owners: dict[str, str]  # the split of each image and group, shared by all: the first that has it
    dropped: Counter[str] = field(default_factory=Counter)  # by the split that has it, or the part not counted
    digests: list[bytes] = field(default_factory=list)

    def wants(self, sample: Sample) -> bool:
        """False, and counted as dropped, for a row of a part of a benchmark that its score is not of."""
        if not (wanted := counted(sample)):
            self.dropped[f"{sample.source}, part {sample.part}"] += 1
        return wanted

    def looked_at(self, sample: Sample) -> tuple[Sample, list[str], bytes]:
        """The row, what ties it to others, and its hash: what takes time, for a thread."""
        return sample, tied(sample, self.examine), sample_sha256(sample.as_row())

    def take(self, ties: Sequence[str], digest: bytes) -> bool:
        """Count a row; False, and counted as dropped, where another split has its group or one of its images or videos.

        Images that do not decode belong to no split: their rows pass to `validate`, which quarantines them.
        """
        if other := claim(self.owners, self.name, ties):
            self.dropped[other] += 1
            return False
        self.digests.append(digest)
        return True


def _rows(config: Config, split: _Split, advance: Advance) -> Iterator[Sample]:
    """The rows of all sources, in order, that the split may have."""
    asked = chain.from_iterable(read(source, split.name, config.seed) for source in config.prepare.sources)
    wanted = (sample for one in asked if split.wants(sample := instructed(one, config.prepare.instructions)))
    for sample, ties, digest in in_order(split.looked_at, wanted):
        if split.take(ties, digest):
            advance(split=split.name)
            yield sample
