"""How fast `vismem validate` is: rows a second and peak memory on generated rows with an image each.

    python benchmarks/validate.py [--rows 100000] [--side 84] [--bad 0.01]

Prints JSON. Exits with status 1 above 60 s (for 100,000 rows; in proportion for more) or 2 GiB.
"""

import argparse
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from vismem.data.sample import Sample, write_shards

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def scenes(split: str, rows: int, side: int, bad: float) -> Iterator[Sample]:
    """Rows with an image of their own each: shapes on a plain ground; a share `bad` of the images is cut short."""
    rng = random.Random(split)
    for number in range(rows):
        image = Image.new("RGB", (side, side), (245, 245, rng.randrange(200, 256)))
        pen = ImageDraw.Draw(image)
        for _ in range(6):
            x, y = rng.randrange(side), rng.randrange(side)
            pen.ellipse((x, y, x + side // 5, y + side // 5), fill=tuple(rng.randrange(256) for _ in range(3)))
        file = io.BytesIO()
        image.save(file, "PNG")
        data = file.getvalue()[: 60 if rng.random() < bad else None]
        yield Sample(
            id=f"{split}-{number}",
            images=(data,),
            question="How many red circles are left of the large blue one?",
            answer=str(number % 7),
            choices=tuple("0123456"),
            rationale="there is one at the top, there is another below it,",
            task=f"task {number % 9}",
        )


def measure(prepared: Path, out: Path) -> None:
    """In a process of its own, so that the peak is the step's: validate and print seconds and peak bytes."""
    from vismem.config import Config
    from vismem.validation.validate import validate

    start = time.perf_counter()
    print(validate(Config(), {"prepare": prepared}, out), file=sys.stderr)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def main() -> int:
    """Make the rows, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=84, help="pixels of an image's side")
    parser.add_argument("--bad", type=float, default=0.01, help="share of images cut short")
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("PREPARED", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        prepared, out = Path(folder, "prepare"), Path(folder, "validate")
        out.mkdir()
        for split, share in SHARES.items():
            write_shards(scenes(split, round(args.rows * share), args.side, args.bad), prepared / split)
        size = sum(path.stat().st_size for path in prepared.rglob("*.parquet"))
        command = [sys.executable, __file__, "--measure", str(prepared), str(out)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    seconds, peak = found["seconds"], found["peak_bytes"] / 2**30
    figures = {
        "rows": args.rows,
        "side_px": args.side,
        "shards_mib": round(size / 2**20, 1),
        "seconds": round(seconds, 2),
        "rows_per_second": round(args.rows / seconds),
        "peak_gib": round(peak, 2),
    }
    print(json.dumps(figures))
    return 0 if seconds < 60 * max(1, args.rows / 100_000) and peak < 2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
