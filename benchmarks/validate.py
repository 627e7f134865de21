"""How fast `vismem validate` is: rows per second and peak memory on generated rows with images, start-up included.

    python benchmarks/validate.py [--rows 100000] [--side 84]

One image in a hundred is cut short. Exits with status 1 above 60 s (for 100,000 rows; in proportion for more) or 2 GiB.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common import ROOT, parser, publish, table

from vismem.config import ScenesSource
from vismem.data.sample import Sample, write_shards
from vismem.data.scenes import generate


def rows(source: ScenesSource, split: str) -> Iterator[Sample]:
    """The split's rows, every hundredth with a damaged image."""
    for number, sample in enumerate(generate(source, split, seed=0)):
        damaged = (sample.images[0][:60], *sample.images[1:])
        yield replace(sample, images=damaged) if number % 100 == 99 else sample


def main() -> int:
    """Make the rows, measure, print."""
    args = parser(__doc__, rows=(100_000, "rows of all splits"), side=(84, "pixels of an image's side")).parse_args()
    tenth = args.rows // 10
    source = ScenesSource(train=8 * tenth, validation=tenth, test=tenth, image_size=args.side)
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "validation", "test"):
            write_shards(rows(source, split), Path(folder, "prepare", split))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
        started = time.perf_counter()
        command = [sys.executable, "-m", "vismem.cli", "validate", "--artifacts", folder]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    figures = {
        "rows": args.rows, "side_px": args.side, "shards_mib": round(size / 2**20, 1), "seconds": round(seconds, 2),
        "rows_per_second": round(args.rows / seconds), "peak_gib": round(peak, 2),
    }  # fmt: skip
    publish(figures, table(" | ".join(figures), [" | ".join(map(str, figures.values()))]), args.json)
    return 0 if seconds < 60 * max(1, args.rows / 100_000) and peak < 2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
