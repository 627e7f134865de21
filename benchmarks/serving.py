"""How much faster the served runtime answers several at once than one by one, and how soon the first word comes.

    OMP_WAIT_POLICY=passive python benchmarks/serving.py [--json FILE]

The memory that comes with VisMem is exported and asked in this process, on one thread; all sides take turns and must
give the same answers. Figures are ratios: the median over the repeats with its range.
"""

import io
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import ROOT, parser, publish, questions, table
from PIL import Image

from vismem.data.sample import Sample
from vismem.export.onnx import write_graphs
from vismem.inference import VisMem
from vismem.serving.answering import Runtime

STREAMS = (1, 2, 4, 8, 16)


def load() -> Runtime:
    """The runtime over the graphs of the memory that comes with VisMem."""
    model = VisMem.from_pretrained(ROOT / "assets" / "tiny-vlm-memory", "cpu").model
    with tempfile.TemporaryDirectory() as folder:
        write_graphs(model, Path(folder) / "onnx", opset=18)
        model.backbone.processor.save_pretrained(Path(folder) / "processor")
        return Runtime.open(folder, verified=True, rows=max(STREAMS), cache_bytes=0)


def answer(runtime: Runtime, sample: Sample) -> tuple[list[int], float]:
    """An answer's tokens, and the seconds until the first came."""
    started, first, tokens = time.perf_counter(), 0.0, []
    pictures = [Image.open(io.BytesIO(data)) for data in sample.images]
    for chunk in runtime.generate(pictures, sample.question):
        first = first or time.perf_counter() - started
        tokens += [] if chunk.token is None else [chunk.token]
    return tokens, first


def turn(runtime: Runtime, samples: Sequence[Sample], streams: int) -> tuple[list[list[int]], float, float]:
    """All answers, asked by so many clients at a time: tokens, seconds, 95th percentile of the first token's."""
    started = time.perf_counter()
    with ThreadPoolExecutor(streams) as clients:
        answers = list(clients.map(lambda sample: answer(runtime, sample), samples))
    seconds = time.perf_counter() - started
    return [tokens for tokens, _ in answers], seconds, float(np.percentile([first for _, first in answers], 95))


def main() -> None:
    """Measure, print, write."""
    args = parser(__doc__, items=(64, "questions"), repeats=(5, "timed turns of each side")).parse_args()
    runtime, samples = load(), questions(args.items, side=168)
    expected = turn(runtime, samples, 1)[0]  # untimed
    turns = []
    for repeat in range(args.repeats):
        for streams in STREAMS:
            tokens, seconds, first = turn(runtime, samples, streams)
            assert tokens == expected, "an answer must be the same alone and among others"
            turns.append({"repeat": repeat, "streams": streams, "seconds": seconds, "first": first})
    found = pd.DataFrame(turns).pivot(index="repeat", columns="streams")
    figures: dict[str, Any] = {"items": len(samples), "tokens": sum(map(len, expected)), "streams": {}}
    for streams in STREAMS:
        ratio = found["seconds"][1] / found["seconds"][streams]
        figures["streams"][streams] = {
            "speed": [round(float(value), 2) for value in (ratio.median(), ratio.min(), ratio.max())],
            "first_p95": round(float((found["first"][streams] / found["first"][1]).median()), 2),
            "tokens_per_second": round(figures["tokens"] / float(found["seconds"][streams].median())),
        }
    rows = [
        "{} | {:.2f} ({:.2f} to {:.2f}) | {} | {:.2f}".format(
            streams, *row["speed"], row["tokens_per_second"], row["first_p95"]
        )
        for streams, row in figures["streams"].items()
    ]
    header = "streams | tokens/s, times one stream's | tokens/s | first token p95, times one stream's"
    publish(figures, table(header, rows), args.json)


if __name__ == "__main__":
    main()
