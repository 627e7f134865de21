"""How fast both executors decode: against Hugging Face's `generate` with memory off, and torch's with memory against
without; what one long memory adds to an answer of 64 tokens.

    OMP_WAIT_POLICY=passive python benchmarks/decoding.py [--json FILE]

Both start from image bytes and questions and end with token ids, which must be equal. All sides take turns in one
process, on one thread: figures are ratios, the median over the repeats with its range. Without `artifacts/` it takes
the tiny VLM with a random head, and memories are forced.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, permutations, product
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pandas as pd
import torch
from common import (
    Parts,
    Tokens,
    hugging_face,
    parser,
    peak_mib,
    publish,
    questions,
    random_base,
    spread,
    table,
    write_bundle,
)

from vismem.config import InvocationConfig, MemoryConfig
from vismem.data.sample import Sample, StoredSamples
from vismem.export.parity import prepared
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Learned, Off, Random
from vismem.generation.loop import DecodeLoop, Request
from vismem.generation.onnx_executor import OnnxExecutor
from vismem.generation.types import LATENT
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel
from vismem.runtime.bundle import Bundle

TARGETS = {1: 1.5, 8: 1.8, 32: 2.0}  # tokens/s of the engine after the first token, as multiples of Hugging Face's
HUGGING_FACE, VANILLA, ONNX, VISMEM = "huggingface", "vanilla", "onnx", "vismem"  # ONNX: vanilla, too
WORDS = 64  # of an answer to which a long memory is added
MOST = 0.15  # of its time, that the memory may add
Item = TypeVar("Item")
Side = Callable[[Sequence[Sample], int], Tokens]  # samples and max new tokens -> the rows' tokens, end token included


def torch_side(model: VisMemModel, policy: InvocationPolicy, samples: Sequence[Sample], longest: int) -> Tokens:
    """Our engine with torch."""
    return [rollout.token_ids for rollout in generate(model, samples, policy, max_new_tokens=longest)]


def onnx_side(executor: OnnxExecutor, policy: InvocationPolicy, samples: Sequence[Sample], longest: int) -> Tokens:
    """Our engine with exported graphs, as it is served: questions join one by one."""
    loop = DecodeLoop(executor)
    asked = [Request([prepared(executor, sample, longest)], policy, longest) for sample in samples]
    rows = [row for request in asked for row in loop.join(request)]
    while loop.step():
        pass
    return [tuple(token for token, _, _ in row.tokens) for row in rows]


def exported(model: VisMemModel) -> OnnxExecutor:
    """The executor over the model's graphs, without the policy's adapter: the base's answers, on one thread."""
    with tempfile.TemporaryDirectory() as folder, model.policy_lora.active(False):
        write_bundle(model, Path(folder))
        return OnnxExecutor(Bundle(Path(folder), threads=1))


def load(artifacts: Path, items: int) -> tuple[VisMemModel, InvocationPolicy, list[Sample]]:
    """A model, the policy by which its memories are learned or forced, and questions."""
    base, stage2 = artifacts / "base", artifacts / "stage2"
    policy: InvocationPolicy = Random(probability=0.5)
    own = base.is_dir()
    samples = StoredSamples(artifacts / "validate" / "data" / "validation") if own else questions(items)
    with tempfile.TemporaryDirectory() as folder:
        base = base if own else random_base(Path(folder))
        if stage2.is_dir():
            model, policy = VisMemModel.from_pretrained(stage2, base), Learned()
        else:
            model = VisMemModel(load_base(base), MemoryConfig(), InvocationConfig())
    model.backbone.prompt_pixels = None  # whole images in all prompts, as Hugging Face has them
    return model, policy, list(islice(samples, items))


def measure(
    sides: dict[str, Side], samples: Sequence[Sample], batch: int, longest: int, repeats: int
) -> dict[str, Any]:
    """What is reported of one batch size. All sides answer all samples once untimed, then in turn."""
    batches = [samples[at : at + batch] for at in range(0, len(samples), batch)]
    made = {name: [row for part in batches for row in answer(part, longest)] for name, answer in sides.items()}
    ours = (VANILLA, ONNX)
    for name in ours:
        assert made[name] == made[HUGGING_FACE], "with memory off the answers must be those of Hugging Face"
    turns = []
    with Parts() as parts:
        parts.wrap(DecodeLoop, "_remember", "memory")
        for repeat, part, name in in_turn(sides, batches, repeats):
            spent = parts.run(partial(sides[name], part, longest))
            first = parts.run(partial(sides[name], part, 1))
            seconds = {"whole": sum(spent.values()), "memory": spent.get("memory", 0.0), "first": sum(first.values())}
            turns.append({"repeat": repeat, "side": name, **seconds})
    found = pd.DataFrame(turns).groupby(["repeat", "side"]).sum().unstack()
    whole, after_first = found["whole"], found["whole"] - found["first"]
    tokens, compared = sum(map(len, made[VANILLA])), [HUGGING_FACE, *ours]
    return {
        "tokens": tokens,
        "tokens_per_second": (tokens / whole[compared].median()).round().to_dict(),
        "tokens_per_second_after_first": ((tokens - len(samples)) / after_first[compared].median()).round().to_dict(),
        "speed": {name: spread(whole[HUGGING_FACE] / whole[name]) for name in ours},
        "speed_after_first_token": {name: spread(after_first[HUGGING_FACE] / after_first[name]) for name in ours},
        "seconds_per_sample": {name: spread(whole[name] / len(samples)) for name in sides},
        "vismem_time": spread(whole[VISMEM] / whole[VANILLA]),
        "memory_share": spread(found["memory"][VISMEM] / whole[VISMEM]),
    }


def long_memory(model: VisMemModel, graphs: OnnxExecutor, samples: Sequence[Sample], repeats: int) -> dict[str, Any]:
    """What one long memory at the start adds to the time of an answer of WORDS tokens, prompt included, as a share.

    By executor. Answers are decoded one at a time, with the memory and without in turn.
    """
    policies: dict[str, InvocationPolicy] = {
        "off": Off(),
        "long": Random(probability=1.0, kinds=(MemoryKind.LONG,), limit=1),
    }
    shares = {}

    def answered(side: Callable[..., Tokens], policy: InvocationPolicy, sample: Sample) -> None:
        (tokens,) = side(policy, [sample], WORDS)
        assert sum(token in graphs.kinds for token in tokens) == policy.limit
        assert sum(token not in {LATENT, *model.memory_ids} for token in tokens) == WORDS

    with (  # no answer ends early
        mock.patch.object(model, "stop_ids", ()),
        mock.patch.object(graphs, "stops", ()),
        Parts() as parts,
    ):
        for executor, side in (("torch", partial(torch_side, model)), (ONNX, partial(onnx_side, graphs))):
            turns = []
            for repeat, sample, name in in_turn(policies, samples, repeats):
                spent = parts.run(partial(answered, side, policies[name], sample))
                turns.append({"repeat": repeat, "side": name, "seconds": sum(spent.values())})
            found = pd.DataFrame(turns).groupby(["repeat", "side"])["seconds"].sum().unstack()
            shares[executor] = spread(found["long"] / found["off"] - 1)
    return shares


def in_turn(sides: Iterable[str], items: Sequence[Item], repeats: int) -> Iterator[tuple[int, Item, str]]:
    """The repeat, the item and the side of each turn: in all orders, since what runs before leaves the caches warm."""
    orders = list(permutations(sides))
    for repeat, (number, item) in product(range(repeats), enumerate(items)):
        for side in orders[7 * (number + repeat) % len(orders)]:  # their neighbours begin with the same side
            yield repeat, item, side


def report(figures: dict[str, Any]) -> str:
    """Small Markdown tables."""

    def cell(value: dict[str, float], scale: float = 1.0) -> str:
        return f"{value['median'] * scale:.2f} ({value['low'] * scale:.2f} to {value['high'] * scale:.2f})"

    rows, memories = [], []
    for batch, row in figures["batches"].items():
        for side, executor in ((VANILLA, "torch"), (ONNX, ONNX)):
            speed = f"{cell(row['speed'][side])} | {cell(row['speed_after_first_token'][side])}"
            rows.append(f"{batch} | {executor} | {speed} | {TARGETS.get(int(batch), '')}")
        vismem = f"{cell(row['vismem_time'])} | {cell(row['memory_share'], 100)}"
        memories.append(f"{batch} | {vismem} | {cell(row['seconds_per_sample'][VISMEM], 1000)}")
    sides = table("batch | executor | tokens/s, times HF's | the same after the first token | target", rows)
    sides += "\n\n" + table("batch | VisMem's time, times vanilla's | of it memory, % | ms per sample", memories)
    peaks = [f"{side} | {mib:.0f}" for side, mib in figures["peak_mib"].items()]
    peak = table("peak of a batch, on top of the model | MiB", peaks)
    added = [f"{name} | {cell(share, 100)} | {100 * MOST:.0f}" for name, share in figures["long_memory"].items()]
    long = table(f"executor | what one long memory adds to the time of {WORDS} tokens, % | at most", added)
    return f"Memories are {figures['memories']}.\n\n{sides}\n\n{peak}\n\n{long}"


def main() -> None:
    """Measure, print, write."""
    options = parser(
        __doc__, items=(64, "questions"), max_new_tokens=(56, "longest answer"), repeats=(5, "timed turns of each side")
    )
    options.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="has base/, validate/ and stage2/")
    options.add_argument("--batch", type=int, nargs="+", default=list(TARGETS), help="batch sizes")
    args = options.parse_args()
    torch.set_num_threads(1)
    model, policy, samples = load(args.artifacts, args.items)
    graphs = exported(model)
    sides: dict[str, Side] = {
        HUGGING_FACE: partial(hugging_face, model),
        VANILLA: partial(torch_side, model, Off(base=True)),
        ONNX: partial(onnx_side, graphs, Off()),
        VISMEM: partial(torch_side, model, policy),
    }
    largest, longest = samples[: max(args.batch)], args.max_new_tokens

    def prepared(answer: Side) -> Callable[[], object]:
        answer(samples[:1], longest)  # libraries' pages and what is made on first use
        return partial(answer, largest, longest)

    figures: dict[str, Any] = {
        "items": len(samples), "max_new_tokens": longest, "repeats": args.repeats,
        "memories": "learned" if isinstance(policy, Learned) else "forced",
        "peak_mib": {name: peak_mib(partial(prepared, answer)) for name, answer in sides.items()},
        "batches": {str(n): measure(sides, samples, n, longest, args.repeats) for n in args.batch},
        "long_memory": long_memory(model, graphs, samples, args.repeats),
    }  # fmt: skip
    publish(figures, report(figures), args.json)


if __name__ == "__main__":
    main()
