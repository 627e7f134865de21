"""How fast the engine decodes: against Hugging Face's `generate` with memory off, and with memory against without.

    OMP_WAIT_POLICY=passive python benchmarks/decoding.py [--json FILE]

Both start from image bytes and questions and end with token ids, which must be equal. All sides take turns in one
process, on one thread: figures are ratios, the median over the repeats with its range. Without `artifacts/` it builds
a random base of the default configuration, and memories are forced.
"""

import io
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import Parts, parser, peak_mib, publish, questions, random_base, spread, table
from PIL import Image

from vismem.config import InvocationConfig, MemoryConfig
from vismem.data.collate import prompt_messages
from vismem.data.sample import Sample, iterate_samples
from vismem.generation import engine
from vismem.generation.invocation import InvocationPolicy, Learned, Off, Random
from vismem.models.vismem import VisMemModel, load_base

TARGETS = {1: 1.0, 8: 1.5, 32: 2.0}  # tokens/s of the engine, as multiples of Hugging Face's
HUGGING_FACE, VANILLA, VISMEM = "huggingface", "vanilla", "vismem"
Tokens = list[tuple[int, ...]]
Side = Callable[[Sequence[Sample], int], Tokens]  # samples and max new tokens -> the rows' tokens, end token included


def engine_side(model: VisMemModel, policy: InvocationPolicy, samples: Sequence[Sample], max_new_tokens: int) -> Tokens:
    """Ours; with memories their latents stand in between."""
    rollouts = engine.generate(model, samples, policy, max_new_tokens=max_new_tokens)
    return [rollout.token_ids for rollout in rollouts]


@torch.inference_mode()
def hugging_face_side(model: VisMemModel, samples: Sequence[Sample], max_new_tokens: int) -> Tokens:
    """The base's own `generate`."""
    processor, base = model.backbone.processor, model.backbone.model
    template = processor.apply_chat_template
    texts = [template(prompt_messages(s), tokenize=False, add_generation_prompt=True) for s in samples]
    images = [[Image.open(io.BytesIO(data)).convert("RGB") for data in s.images] for s in samples]
    encoded = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    made = base.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
    answers = made[:, encoded["input_ids"].shape[1] :].tolist()
    stops = model.stop_ids
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in answers]
    return [tuple(row[:end]) for row, end in zip(answers, ends, strict=True)]


def load(artifacts: Path, folder: Path, items: int) -> tuple[dict[str, Side], list[Sample], str]:
    """The sides on one model, validation questions, and whether memories are learned or forced."""
    policy: InvocationPolicy = Random(probability=0.5)
    if (artifacts / "base").is_dir():
        base = artifacts / "base"
        samples = list(islice(iterate_samples(artifacts / "validate" / "data" / "validation"), items))
    else:
        samples = questions(items)
        base = random_base(folder, samples)
    if (artifacts / "stage2").is_dir():
        model, policy = VisMemModel.from_pretrained(artifacts / "stage2", base), Learned()
    else:
        model = VisMemModel(load_base(base), MemoryConfig(), InvocationConfig())
    sides: dict[str, Side] = {
        HUGGING_FACE: partial(hugging_face_side, model),
        VANILLA: partial(engine_side, model, Off()),
        VISMEM: partial(engine_side, model, policy),
    }
    return sides, samples, "learned" if isinstance(policy, Learned) else "forced"


def measure(
    sides: dict[str, Side], samples: Sequence[Sample], batch: int, longest: int, repeats: int
) -> dict[str, Any]:
    """What is reported of one batch size. All sides answer all samples once untimed, then in turn."""
    batches = [samples[at : at + batch] for at in range(0, len(samples), batch)]
    made = {name: [row for part in batches for row in answer(part, longest)] for name, answer in sides.items()}
    assert made[HUGGING_FACE] == made[VANILLA], "with memory off the answers must be those of Hugging Face"
    names = list(sides)
    spent = {name: {part: [0.0] * repeats for part in ("whole", "first", "memory")} for name in names}
    with Parts() as parts:
        parts.wrap(engine._Decoder, "_insert", "memory", whole=True)
        for repeat in range(repeats):
            for number, part in enumerate(batches):
                for turn in range(len(names)):
                    name = names[(turn + number + repeat) % len(names)]  # nobody always comes first
                    whole = parts.run(partial(sides[name], part, longest))
                    spent[name]["whole"][repeat] += sum(whole.values())
                    spent[name]["memory"][repeat] += whole.get("memory", 0.0)
                    spent[name]["first"][repeat] += sum(parts.run(partial(sides[name], part, 1)).values())
    return ratios(spent, sum(map(len, made[VANILLA])), len(samples))


def ratios(spent: dict[str, dict[str, list[float]]], tokens: int, items: int) -> dict[str, Any]:
    """Speeds and shares from the seconds of every side: whole, to the first token, and in memories."""

    def over(a: list[float], b: list[float]) -> dict[str, float]:
        return spread([x / y for x, y in zip(a, b, strict=True)])

    def decoding(name: str) -> list[float]:
        return [a - b for a, b in zip(spent[name]["whole"], spent[name]["first"], strict=True)]

    def speed(count: int, seconds: Callable[[str], list[float]]) -> dict[str, int]:
        return {name: round(count / statistics.median(seconds(name))) for name in (HUGGING_FACE, VANILLA)}

    return {
        "tokens": tokens,
        "tokens_per_second": speed(tokens, lambda name: spent[name]["whole"]),
        "tokens_per_second_after_first": speed(tokens - items, decoding),
        "speed": over(spent[HUGGING_FACE]["whole"], spent[VANILLA]["whole"]),
        "speed_after_first_token": over(decoding(HUGGING_FACE), decoding(VANILLA)),
        "seconds_per_sample": {name: spread([s / items for s in side["whole"]]) for name, side in spent.items()},
        "vismem_time": over(spent[VISMEM]["whole"], spent[VANILLA]["whole"]),
        "memory_share": over(spent[VISMEM]["memory"], spent[VISMEM]["whole"]),
    }


def report(figures: dict[str, Any]) -> str:
    """Two small Markdown tables."""

    def cell(value: dict[str, float], scale: float = 1.0) -> str:
        return f"{value['median'] * scale:.2f} ({value['low'] * scale:.2f} to {value['high'] * scale:.2f})"

    header = ["batch", "tokens/s, times HF's", "the same after the first token", "target"]
    header += ["VisMem's time, times vanilla's", "of it memory, %", "VisMem, ms per sample"]
    rows = [
        [batch, cell(row["speed"]), cell(row["speed_after_first_token"]), TARGETS.get(int(batch), ""),
         cell(row["vismem_time"]), cell(row["memory_share"], 100), cell(row["seconds_per_sample"][VISMEM], 1000)]
        for batch, row in figures["batches"].items()
    ]  # fmt: skip
    memory = [[name, f"{value:.0f}"] for name, value in figures["peak_mib"].items()]
    peaks = table(["peak of a batch, on top of the model", "MiB"], memory)
    return f"Memories are {figures['memories']}.\n\n{table(header, rows)}\n\n{peaks}"


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__)
    options.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="has base/, validate/ and stage2/")
    options.add_argument("--items", type=int, default=64, help="validation questions")
    options.add_argument("--batch", type=int, nargs="+", default=list(TARGETS), help="batch sizes")
    options.add_argument("--max-new-tokens", type=int, default=56)
    options.add_argument("--repeats", type=int, default=5)
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sides, samples, memories = load(args.artifacts, Path(folder), args.items)
        largest, longest = samples[: max(args.batch)], args.max_new_tokens

        def prepared(answer: Side) -> Callable[[], object]:
            answer(samples[:1], longest)  # libraries' pages and what is made on first use
            return partial(answer, largest, longest)

        figures: dict[str, Any] = {
            "items": len(samples), "max_new_tokens": longest, "repeats": args.repeats, "memories": memories,
            "peak_mib": {name: peak_mib(partial(prepared, answer)) for name, answer in sides.items()},
            "batches": {str(n): measure(sides, samples, n, longest, args.repeats) for n in args.batch},
        }  # fmt: skip
    publish(figures, report(figures), args.json)


if __name__ == "__main__":
    main()
