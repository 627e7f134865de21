"""What training and decoding cost at Qwen2.5-VL-7B's size: its real configuration, random weights, no download.

    python benchmarks/gpu.py --json gpu.json

Prints Markdown tables (and writes JSON): stage I and stage II steps at the paper's group size with gradient
checkpointing, as `deploy/profiles/qwen2_5_vl_7b.yaml` sets them, their peak memory against what `vismem plan` counts
for the same questions; decoding at several batch sizes, against Hugging Face's `generate`; what memories add to it;
the engine as it serves many streams at once. `--size tiny` is the same at toy size, for a CPU, where peaks are counted
as the plan counts them.

MFU counts useful work only: the FLOPs of a step taken one rollout at a time, without recomputation and padding. The
share of the bandwidth counts what a decoding step must read: the language model's weights and head once, and the cache.
Answers are greedy: in float32 those of all sides must be equal. In bfloat16 a tie may fall either way, and what follows
it differs; so the tables say which share of the tokens comes before the first difference.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from typing import Any

import pandas as pd
import torch
from common import ROOT, Parts, Steps, answer, hugging_face, now, parser, publish, questions, step_parts, table, turn
from qwen import SEVEN_B, TINY, build
from torch.utils.flop_counter import FlopCounterMode

from vismem.config import Config, load_config
from vismem.data.sample import Sample
from vismem.generation.engine import generate
from vismem.generation.invocation import Off, Random
from vismem.generation.prompts import encode
from vismem.generation.torch_executor import TorchExecutor
from vismem.models.vismem import VisMemModel
from vismem.plan.machine import CARDS, Machine
from vismem.plan.model import Questions
from vismem.plan.model import questions as planned_questions
from vismem.plan.rehearsal import Rehearsal, StepPlan
from vismem.plan.shapes import Shapes
from vismem.serving.answering import Runtime
from vismem.serving.pieces import Chunk
from vismem.training.stage2 import ANSWERED, decisions, fit_batch, fit_invocation

STAGES = {"stage1": "stage I", "stage2": "stage II"}
SHEETS = {  # data sheets: dense bf16 FLOP/s, bytes/s
    "H100 80GB HBM3": (989e12, 3.35e12), "H100 PCIe": (756e12, 2.0e12), "H200": (989e12, 4.8e12),
    "A100-SXM4-80GB": (312e12, 2.04e12), "A100-SXM4-40GB": (312e12, 1.56e12),
}  # fmt: skip


def peaks() -> dict[str, Any]:
    """FLOP/s and bytes/s of the device, and where the figures are from: its data sheet, or a measurement here."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for known, (flops, bandwidth) in SHEETS.items():
        if known in name:
            return {"peak_flops": flops, "peak_bandwidth": bandwidth, "peaks": "data sheet"}
    size, dtype = (8192, torch.bfloat16) if name else (1024, torch.float32)
    square = torch.ones(size, size, dtype=dtype, device="cuda" if name else "cpu")
    large = square.repeat(8, 1)

    def fastest(function: Callable[[], object]) -> float:
        return max(min(sum(Parts().run(function).values()) for _ in range(5)), 1e-9)

    flops, moved = 2 * size**3, 2 * large.numel() * large.element_size()
    speeds = {"peak_flops": flops / fastest(lambda: square @ square), "peak_bandwidth": moved / fastest(large.clone)}
    return {**speeds, "peaks": "measured"}


def planned(config: Config, side: int, card: str) -> list[StepPlan]:
    """What `vismem plan` says of both stages. Call it in another process: it sets accelerate to the CPU."""
    machine = Machine.named(f"1x{card}")
    return [Rehearsal(name, config, machine, Questions((side, side))).rehearse() for name in STAGES]


def peak_bytes(model: VisMemModel, step: Steps) -> int:
    """Bytes of tensors at the peak of a step: by torch's allocator, or on the CPU as a plan counts them."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return int(torch.cuda.max_memory_allocated())
    base, states = model.backbone.model, step.optimizer.state.values()
    gradients = (weight.grad for weight in model.parameters() if weight.grad is not None)
    with Shapes(hollow=False) as shapes:
        for held in (base.parameters(), base.buffers(), model.parameters(), gradients, *(s.values() for s in states)):
            for tensor in held:
                shapes.count(tensor)
        step()
    return int(shapes.peak)


def training(model: VisMemModel, config: Config, args: argparse.Namespace) -> list[Any]:
    """Steps of both stages: seconds, parts, tokens per second, memory, FLOPs; what is planned of them."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    card = next((card for card in CARDS if card in name), None)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        plans = process.submit(planned, config, args.side, card or "H100").result()
    samples, rollouts = planned_questions(args.prompts, Questions((args.side, args.side))), args.prompts * args.group
    plain = config.grpo.model_copy(update={"micro_batch": 1, "gradient_checkpointing": False})
    answers = generate(model, samples, ANSWERED, max_new_tokens=args.tokens, temperature=config.grpo.temperature)
    decided = decisions(model, samples, answers, fit_batch(config.grpo))
    fit_invocation(model, *decided, config.stage2, config.grpo.temperature)
    found = []
    for plan, stage in zip(plans, (config.stage1, config.stage2), strict=True):
        with FlopCounterMode(display=False) as counted:
            Steps(model, samples, plain, stage)()
        model.zero_grad()  # the earlier stage's too
        step = Steps(model, samples, config.grpo, stage)
        step()
        peak = peak_bytes(model, step)
        with step_parts() as clocks:
            parts = pd.DataFrame([clocks.run(step) for _ in range(args.steps)]).fillna(0.0).mean()
        phases = {phase: sum(plan.phases[phase].values()) for phase in ("rollouts", "backward", "update")}
        found.append({
            "stage": STAGES[plan.name], "seconds": parts.sum(), "parts": parts.sort_values(ascending=False).to_dict(),
            "rollouts": rollouts, "tokens": rollouts * step.metrics["answer_length"], "memories": step.memories,
            "settings": config.grpo.model_dump() | stage.model_dump(), "flops": counted.get_total_flops(),
            "peak_bytes": peak, "planned_bytes": max(phases.values()), "planned_phases": phases,
            "planned_seconds": plan.seconds if card else None,
            "trained": sum(p.numel() for p in step.trained.values()),
        })  # fmt: skip
    return found


def forced(args: argparse.Namespace) -> Random:
    """The policy that forces as many memories as `args` allow, the first at the answer's start."""
    return Random(probability=1.0, anywhere=min(1.0, 2 * args.memories / args.tokens), limit=args.memories)


def same(ours: Iterable[Sequence[int]], theirs: Iterable[Sequence[int]]) -> float:
    """Which share of the tokens of equally long answers comes before an answer's first that differs."""
    alike = total = 0
    for pairs in map(list, map(zip, ours, theirs)):
        alike += next((at for at, (own, other) in enumerate(pairs) if own != other), len(pairs))
        total += len(pairs)
    return alike / total


def decoding(model: VisMemModel, samples: Sequence[Sample], args: argparse.Namespace) -> list[Any]:
    """tokens per second and bytes per second at several batch sizes, without memories and with them."""
    text = model.backbone.model.config.text_config
    language = model.backbone.model.model.language_model
    weights = sum(p.numel() * p.element_size() for p in [*language.layers.parameters(), model.backbone.head.weight])
    entry = model.backbone.head.weight.element_size()
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * language.layers[0].self_attn.head_dim * entry
    prompt = int(encode(model.backbone, samples[:1]).mask.sum())
    found = []

    def timed(side: Callable[..., Any], chosen: Sequence[Sample], tokens: int) -> tuple[float, Any]:
        side(model, chosen, max_new_tokens=2)
        start = now()
        made = side(model, chosen, max_new_tokens=tokens)
        return now() - start, made

    without, with_memories = partial(generate, policy=Off()), partial(generate, policy=forced(args))
    for batch in args.batches:
        chosen = [samples[i % len(samples)] for i in range(batch)]
        first, _ = timed(without, chosen, 1)
        off, answers = timed(without, chosen, args.tokens + 1)
        theirs_first, _ = timed(hugging_face, chosen, 1)
        theirs, expected = timed(hugging_face, chosen, args.tokens + 1)
        on, remembering = timed(with_memories, chosen, args.tokens + 1)
        step, theirs_step = (off - first) / args.tokens, (theirs - theirs_first) / args.tokens
        read = weights + batch * (prompt + args.tokens / 2) * token
        found.append({
            "batch": batch, "first_s": first, "step_s": step, "tokens_s": batch / step,
            "hugging_face_tokens_s": batch / theirs_step, "same": same((r.token_ids for r in answers), expected),
            "bytes_s": read / step, "memories": sum(len(r.invocations) for r in remembering) / batch,
            "overhead": on / off - 1,
        })  # fmt: skip
    return found


def serving(model: VisMemModel, samples: Sequence[Sample], args: argparse.Namespace) -> list[Any]:
    """Many streams at once, each of three answers of several lengths: tokens per second, seconds to the first token."""
    whole = [r.token_ids for r in generate(model, samples, Off(), max_new_tokens=args.tokens)]
    asked = [(i % len(samples), -(-args.tokens * (i % 4 + 1) // 4)) for i in range(3 * args.streams)]
    executor, found = TorchExecutor(model), []
    executor.modes = {"off": Off(), "forced": forced(args)}
    with closing(Runtime(executor, rows=args.streams)) as runtime:

        def ask(mode: str, question: tuple[int, int]) -> tuple[list[Chunk], float]:
            return answer(runtime, samples[question[0]], max_new_tokens=question[1], memory=mode)

        for mode in executor.modes:
            answers, seconds, first = turn(partial(ask, mode), asked, args.streams)
            usage = [chunks[-1].usage for chunks in answers]
            words = [[c.token for c in chunks if c.event == "token" and c.token is not None] for chunks in answers]
            found.append({
                "memory": mode, "streams": args.streams, "answers": len(asked), "tokens": sum(map(len, words)),
                "tokens_s": sum(map(len, words)) / seconds, "first_p95_s": first,
                "memories": sum(sum(each.memories.values()) for each in usage if each) / len(asked),
                "same": same(words, (whole[at][:tokens] for at, tokens in asked)) if mode == "off" else None,
            })  # fmt: skip
    return found


def report(found: dict[str, Any]) -> str:
    """Markdown."""
    flops, bandwidth = found["peak_flops"], found["peak_bandwidth"]
    steps, rows, streams = [], [], []
    for s in found["training"]:
        shares = ", ".join(f"{part} {spent / s['seconds']:.0%}" for part, spent in s["parts"].items())
        planned_s = f"{s['planned_seconds']:.2f}" if s["planned_seconds"] else "-"
        speed = f"{s['tokens'] / s['seconds']:.0f} | {s['flops'] / s['seconds'] / flops:.1%}"
        memory = f"{s['peak_bytes'] / 2**30:.3g} | {s['planned_bytes'] / 2**30:.3g} | {shares}"
        seconds = f"{s['memories']:.2f} | {s['seconds']:.2f} | {planned_s}"
        steps.append(f"{s['stage']} | {s['rollouts']} | {seconds} | {speed} | {memory}")
    for d in found["decoding"]:
        speed = f"{1000 * d['step_s']:.2f} | {d['tokens_s']:.0f} | {d['tokens_s'] / d['hugging_face_tokens_s']:.2f}"
        speed += f" | {d['same']:.0%} | {d['bytes_s'] / bandwidth:.1%}"
        rows.append(f"{d['batch']} | {d['first_s']:.3f} | {speed} | {d['memories']:.2f} | {d['overhead']:+.1%}")
    for d in found["serving"]:
        alike = "-" if d["same"] is None else f"{d['same']:.0%}"
        speed = f"{d['tokens_s']:.0f} | {d['first_p95_s']:.3f} | {alike}"
        streams.append(f"{d['memory']} | {d['streams']} | {d['answers']} | {d['memories']:.2f} | {speed}")
    head = "stage | rollouts | memories per answer | s per step | as planned | tokens/s | MFU | peak GiB | as planned"
    decode = "batch | first token, s | ms per token | tokens/s | times HF's | same tokens as HF | share of bandwidth"
    serve = "memory | streams | answers | memories per answer | tokens/s | first token p95, s | same tokens as alone"
    source = f"peaks ({found['peaks']}): {flops / 1e12:.3g} TFLOP/s, {bandwidth / 1e12:.3g} TB/s"
    trained = table(f"{head} | where the time goes", steps)
    decoded = table(f"{decode} | memories | time they add", rows)
    return "\n\n".join([source, trained, decoded, table(serve, streams)])


def main() -> None:
    """Build, measure, print, write."""
    options = parser(
        __doc__, prompts=(2, "prompts per training step; the paper: 8"), group=(16, "rollouts per prompt [paper: 16]"),
        tokens=(256, "tokens per answer"), memories=(4, "max memories per answer"),
        side=(448, "pixels of an image's side"), steps=(2, "timed training steps, after two that are not"),
        streams=(64, "answers that are served at once"),
    )  # fmt: skip
    options.add_argument("--size", choices=("7b", "tiny"), default="7b")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="batch sizes of decoding")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "base.model": folder, "base.dtype": "bfloat16" if torch.cuda.is_available() else "float32",
            "invocation.max_per_answer": args.memories, "stage1.anywhere_after": 0.0,
            "stage1.group_size": args.group, "stage2.group_size": args.group,
            "grpo.batch_size": args.prompts, "grpo.max_new_tokens": args.tokens,
        }  # fmt: skip
        config = load_config(ROOT / "params.yaml", "qwen2_5_vl_7b", settings)
        model, samples = build(SEVEN_B if args.size == "7b" else TINY, args.side, config), questions(8, args.side)
        parameters = sum(p.numel() for p in model.backbone.model.parameters())
        found: dict[str, Any] = {**peaks(), "parameters": parameters, "training": training(model, config, args)}
    found |= {"decoding": decoding(model, samples, args), "serving": serving(model, samples, args)}
    if config.base.dtype == "float32":
        assert {d["same"] for d in (*found["decoding"], *found["serving"])} <= {1.0, None}, "answers must be the same"
    publish(found, report(found), args.json)


if __name__ == "__main__":
    main()
