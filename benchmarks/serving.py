"""How much faster the served runtime answers several at once than one by one, also where answers are longer, how soon
the first word comes, and what Triton's gRPC adds to an answer.

    OMP_WAIT_POLICY=passive python benchmarks/serving.py [--json FILE]

The memory that comes with VisMem is exported and asked in this process, on one thread, and behind a Triton server; all
sides take turns and must give the same answers. Figures are ratios: the median over the repeats with its range.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from common import MEMORY, answer, parser, publish, questions, spread, table, turn, write_bundle

from vismem.data.sample import Sample
from vismem.inference import VisMem
from vismem.provenance import write_manifest
from vismem.serving.answering import Runtime
from vismem.serving.client import Client
from vismem.serving.exchange import marked
from vismem.serving.golden import write_golden
from vismem.serving.repository import write_model_repository
from vismem.serving.server import TritonServer, triton_server

STREAMS = (1, 2, 4, 8, 16)
LONGER, TOGETHER = (64, 256), 8  # words of an answer, and streams, where answers go on past their end


def export(folder: Path) -> None:
    """Write the graphs of the memory that comes with VisMem, its processor, and golden questions."""
    write_bundle(VisMem.from_pretrained(MEMORY, "cpu").model, folder)
    with closing(Runtime.open(folder)) as runtime:
        write_golden(runtime, ((sample.images, sample.question) for sample in questions(4)), folder)


def load() -> Runtime:
    """The runtime over them."""
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder))
        return Runtime.open(folder, rows=max(STREAMS), cache_bytes=0)


@contextmanager
def triton(name: str = "vismem") -> Iterator[TritonServer]:
    """The same graphs behind Triton as the model `name`, whose worker has one thread too."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export(folder / "bundle")
        write_manifest(folder / "bundle")
        write_model_repository(folder / "bundle", folder / "repository", name, 1)
        with triton_server(folder / "repository", log=folder / "log") as server:
            yield server


def longer(runtime: Runtime, samples: Sequence[Sample], repeats: int) -> dict[tuple[int, str], list[float]]:
    """Times that TOGETHER streams are faster than one, by the words of an answer and the memory."""
    runtime.executor.stops = frozenset()
    found = dict[tuple[int, str], list[float]]()
    for words, memory in product(LONGER, ("learned", "off")):
        ask = partial(answer, runtime, max_new_tokens=words, memory=memory)
        turns = [[turn(ask, samples, streams)[1] for streams in (1, TOGETHER)] for _ in range(repeats)]
        found[words, memory] = [one / together for one, together in turns]
    return found


def over_grpc(runtime: Runtime, samples: Sequence[Sample], repeats: int) -> list[float]:
    """Seconds of one stream over gRPC, over those in this process; each turn asks others, so that nothing is cached.

    All give the same answers, as does the torch executor.
    """
    ratios, model = [], VisMem.from_pretrained(MEMORY, "cpu")
    with triton() as server:
        client = Client(f"grpc://{server.grpc_url}", model="vismem")
        client.ask(samples[0].images, samples[0].question)
        for repeat in range(repeats):
            asked = samples[repeat::repeats]
            started = time.perf_counter()
            own = [[(chunk.text, chunk.event) for chunk in answer(runtime, sample)[0]] for sample in asked]
            between = time.perf_counter()
            found = [list(client.stream(sample.images, sample.question)) for sample in asked]
            ratios.append((time.perf_counter() - between) / (between - started))
            assert own == [[(piece.text, piece.event) for piece in pieces] for pieces in found]
            torch_answers = model.answers([(sample.images, sample.question) for sample in asked])
            assert [marked(pieces) for pieces in found] == [answer.marked for answer in torch_answers]
    return ratios


def main() -> None:
    """Measure, print, write."""
    args = parser(__doc__, items=(64, "questions"), repeats=(5, "timed turns of each side")).parse_args()
    runtime, samples = load(), questions(args.items, side=168)
    ask = partial(answer, runtime)
    expected = turn(ask, samples, 1)[0]  # untimed
    turns = []
    for repeat in range(args.repeats):
        for streams in STREAMS:
            chunks, seconds, first = turn(ask, samples, streams)
            assert chunks == expected, "an answer must be the same alone and among others"
            turns.append({"repeat": repeat, "streams": streams, "seconds": seconds, "first": first})
    found = pd.DataFrame(turns).pivot(index="repeat", columns="streams")
    figures: dict[str, Any] = {"items": len(samples), "tokens": sum(map(len, expected)) - len(samples), "streams": {}}
    for streams in STREAMS:
        ratio = found["seconds"][1] / found["seconds"][streams]
        figures["streams"][streams] = {
            "speed": spread(ratio),
            "first_p95": round(float((found["first"][streams] / found["first"][1]).median()), 2),
            "tokens_per_second": round(figures["tokens"] / float(found["seconds"][streams].median())),
        }
    figures["grpc"] = spread(over_grpc(runtime, questions(args.items * args.repeats, side=168), args.repeats))
    figures["longer"] = {
        f"{words} words, memory {memory}": spread(ratios)
        for (words, memory), ratios in longer(runtime, samples, args.repeats).items()
    }
    rows = [
        "{} | {:.2f} ({:.2f} to {:.2f}) | {} | {:.2f}".format(
            streams, *row["speed"].values(), row["tokens_per_second"], row["first_p95"]
        )
        for streams, row in figures["streams"].items()
    ]
    header = "streams | tokens/s, times one stream's | tokens/s | first token p95, times one stream's"
    took = "One stream over gRPC takes {:.2f} ({:.2f} to {:.2f}) times as long as in this process."
    report = [table(header, rows), took.format(*figures["grpc"].values())]
    rows = ["{} | {:.2f} ({:.2f} to {:.2f})".format(name, *ratio.values()) for name, ratio in figures["longer"].items()]
    report.append(table(f"answers of | {TOGETHER} streams' tokens/s, times one stream's", rows))
    publish(figures, "\n\n".join(report), args.json)


if __name__ == "__main__":
    main()
