"""How fast the engine decodes: against Hugging Face's `generate` with memory off, and with memory against without.

    OMP_WAIT_POLICY=passive python benchmarks/decoding.py [--out FILE]

Both start from image bytes and questions and end with token ids, which must be equal. All sides take turns in one
process, on one thread: figures are ratios, the median over the repeats with its range. Without `artifacts/` it builds
a random base of the default configuration, and memories are forced.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from timing import machine, table

from vismem.config import InvocationConfig, MemoryConfig, ScenesSource
from vismem.data.collate import prompt_messages
from vismem.data.sample import Sample, iterate_samples, write_shards
from vismem.data.scenes import generate as scenes
from vismem.generation import engine
from vismem.generation.invocation import InvocationPolicy, Learned, Off, Random
from vismem.models.vismem import VisMemModel, load_base

ASSETS = Path(__file__).resolve().parents[1] / "assets"
TARGETS = {1: 1.0, 8: 1.5, 32: 2.0}  # tokens/s of the engine, as multiples of Hugging Face's
HUGGING_FACE, VANILLA, VISMEM = "huggingface", "vanilla", "vismem"
Clock = Callable[[], float]
Tokens = list[tuple[int, ...]]


class Side:
    """One way to answer a batch of samples, from image bytes and question to token ids."""

    def __init__(self, name: str, model: VisMemModel, policy: InvocationPolicy) -> None:
        self.name, self.model, self.policy = name, model, policy

    def answer(self, samples: Sequence[Sample], max_new_tokens: int) -> Tokens:
        """The rows' tokens, end token included; with memories their latents stand in between."""
        if self.name == HUGGING_FACE:
            return self._hugging_face(samples, max_new_tokens)
        rollouts = engine.generate(self.model, samples, self.policy, max_new_tokens=max_new_tokens)
        return [rollout.token_ids for rollout in rollouts]

    @torch.inference_mode()
    def _hugging_face(self, samples: Sequence[Sample], max_new_tokens: int) -> Tokens:
        processor, base = self.model.backbone.processor, self.model.backbone.model
        template = processor.apply_chat_template
        texts = [template(prompt_messages(s), tokenize=False, add_generation_prompt=True) for s in samples]
        images = [[Image.open(io.BytesIO(data)).convert("RGB") for data in s.images] for s in samples]
        encoded = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        made = base.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
        answers = made[:, encoded["input_ids"].shape[1] :].tolist()
        stops = self.model.stop_ids
        ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in answers]
        return [tuple(row[:end]) for row, end in zip(answers, ends, strict=True)]


def measure(
    sides: Sequence[Side], samples: Sequence[Sample], batch: int, longest: int, repeats: int, clock: Clock
) -> dict[str, Any]:
    """Seconds of every side for all samples, one entry a repeat: whole, to the first token, and in memories.

    Beside them the tokens that each side made.
    """
    batches = [samples[at : at + batch] for at in range(0, len(samples), batch)]
    made = {side.name: [row for part in batches for row in side.answer(part, longest)] for side in sides}
    assert made[HUGGING_FACE] == made[VANILLA], "with memory off the answers must be those of Hugging Face"
    seconds: dict[str, dict[str, list[float]]] = {
        side.name: {part: [0.0] * repeats for part in ("whole", "first", "memory")} for side in sides
    }
    for repeat in range(repeats):
        for number, part in enumerate(batches):
            for turn in range(len(sides)):
                side = sides[(turn + number + repeat) % len(sides)]  # nobody always comes first
                spent = seconds[side.name]
                with timed(engine._Decoder, "_insert", clock) as memory:
                    spent["whole"][repeat] += seconds_of(partial(side.answer, part, longest), clock)
                spent["memory"][repeat] += sum(memory)
                spent["first"][repeat] += seconds_of(partial(side.answer, part, 1), clock)
    return {"seconds": seconds, "tokens": {name: sum(map(len, rows)) for name, rows in made.items()}}


def seconds_of(work: Callable[[], object], clock: Clock) -> float:
    """Time of one call."""
    start = clock()
    work()
    return clock() - start


@contextmanager
def timed(owner: type, method: str, clock: Clock) -> Iterator[list[float]]:
    """Within the block, the seconds of every call of a method are noted."""
    spent: list[float] = []
    original = getattr(owner, method)

    def noting(*args: Any) -> None:
        spent.append(seconds_of(partial(original, *args), clock))

    with mock.patch.object(owner, method, noting):
        yield spent


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def ratios(found: dict[str, Any], items: int) -> dict[str, Any]:
    """What is reported of one batch size."""
    seconds, tokens = found["seconds"], found["tokens"]
    theirs, ours, memory = seconds[HUGGING_FACE], seconds[VANILLA], seconds[VISMEM]

    def over(a: list[float], b: list[float]) -> dict[str, float]:
        return spread([x / y for x, y in zip(a, b, strict=True)])

    def decoding(side: dict[str, list[float]]) -> list[float]:
        return [a - b for a, b in zip(side["whole"], side["first"], strict=True)]

    count = tokens[VANILLA]
    return {
        "tokens": count,
        "tokens_per_second": {
            name: round(count / statistics.median(seconds[name]["whole"])) for name in (HUGGING_FACE, VANILLA)
        },
        "tokens_per_second_after_first": {
            name: round((count - items) / statistics.median(decoding(seconds[name])))
            for name in (HUGGING_FACE, VANILLA)
        },
        "speed": over(theirs["whole"], ours["whole"]),
        "speed_after_first_token": over(decoding(theirs), decoding(ours)),
        "seconds_a_sample": {name: spread([s / items for s in side["whole"]]) for name, side in seconds.items()},
        "vismem_time": over(memory["whole"], ours["whole"]),
        "memory_share": over(memory["memory"], memory["whole"]),
    }


def peak(side: Side, samples: Sequence[Sample], longest: int) -> float:
    """MiB that one batch needs at most, on top of the model; measured in a fork of this process (Linux)."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def measured() -> None:
        side.answer(samples[:1], longest)  # libraries' pages and what is made on first use
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = held("VmRSS")
        side.answer(samples, longest)
        sender.send(held("VmHWM") - before)

    process = context.Process(target=measured)  # type: ignore[attr-defined]
    process.start()
    found: float = receiver.recv()
    process.join()
    return round(found, 1)


def held(line: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    return float(Path("/proc/self/status").read_text().split(line + ":")[1].split()[0]) / 1024


def assets(folder: Path, items: int) -> None:
    """The tiny VLM and its memory, and scenes to ask them about, where no run of the pipeline is at hand."""
    source = ScenesSource(train=0, validation=items, test=0)
    write_shards(scenes(source, "validation", seed=0), folder / "validate" / "data" / "validation")
    (folder / "base").symlink_to(ASSETS / "tiny-vlm")
    (folder / "stage2").symlink_to(ASSETS / "tiny-vlm-memory")


def sides_of(artifacts: Path) -> list[Side]:
    """Hugging Face, vanilla and VisMem on one model; memories are forced where no trained VisMem is there."""
    trained = (artifacts / "stage2").is_dir()
    if trained:
        model = VisMemModel.from_pretrained(artifacts / "stage2", artifacts / "base")
    else:
        model = VisMemModel(load_base(artifacts / "base"), MemoryConfig(), InvocationConfig())
    policy = Learned() if trained else Random(probability=0.5)
    return [Side(HUGGING_FACE, model, Off()), Side(VANILLA, model, Off()), Side(VISMEM, model, policy)]


def report(figures: dict[str, Any]) -> str:
    """Two small Markdown tables."""

    def cell(value: dict[str, float], scale: float = 1.0) -> str:
        return f"{value['median'] * scale:.2f} ({value['low'] * scale:.2f} to {value['high'] * scale:.2f})"

    header = ["batch", "tokens/s, times HF's", "the same after the first token", "target"]
    header += ["VisMem's time, times vanilla's", "of it memory, %", "VisMem, ms a sample"]
    rows = [
        [
            batch,
            cell(row["speed"]),
            cell(row["speed_after_first_token"]),
            TARGETS.get(int(batch), ""),
            cell(row["vismem_time"]),
            cell(row["memory_share"], 100),
            cell(row["seconds_a_sample"][VISMEM], 1000),
        ]
        for batch, row in figures["batches"].items()
    ]
    memory = [[name, f"{value:.0f}"] for name, value in figures["peak_mib"].items()]
    return f"{table(header, rows)}\n\n{table(['peak of a batch, on top of the model', 'MiB'], memory)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="has base/, validate/ and stage2/")
    parser.add_argument("--items", type=int, default=64, help="validation questions")
    parser.add_argument("--batch", type=int, nargs="+", default=list(TARGETS), help="batch sizes")
    parser.add_argument("--max-new-tokens", type=int, default=56)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--assets", action="store_true", help="measure the assets, whether or not --artifacts is there")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds, where the machine is busy")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.assets or not (args.artifacts / "base").is_dir():
            args.artifacts = Path(folder)
            assets(args.artifacts, args.items)
        sides = sides_of(args.artifacts)
        samples = list(islice(iterate_samples(args.artifacts / "validate" / "data" / "validation"), args.items))
        batch, longest = max(args.batch), args.max_new_tokens
        peaks = {side.name: peak(side, samples[:batch], longest) for side in sides}
        clock = time.process_time if args.cpu_time else time.perf_counter
        figures: dict[str, Any] = {
            "items": len(samples),
            "max_new_tokens": longest,
            "repeats": args.repeats,
            "clock": clock.__name__,
            "memories": "learned" if isinstance(sides[-1].policy, Learned) else "forced",
            "machine": machine(),
            "load_average": os.getloadavg()[0],
            "peak_mib": peaks,
            "batches": {
                str(batch): ratios(measure(sides, samples, batch, longest, args.repeats, clock), len(samples))
                for batch in args.batch
            },
        }
    print(f"{figures['machine']}; {figures['clock']}, load average {figures['load_average']:.1f}", end="; ")
    print(f"memories {figures['memories']}\n")
    print(report(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
