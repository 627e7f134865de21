"""What training and decoding cost at Qwen2.5-VL-7B's size: its real configuration, random weights, no download.

    python benchmarks/gpu.py --json gpu.json

Prints Markdown tables (and writes JSON): stage I and stage II steps at the paper's group size with gradient
checkpointing, as `deploy/profiles/qwen2_5_vl_7b.yaml` sets them; decoding at several batch sizes; what memories add to
it. `--size tiny` is the same at toy size, for a CPU.

MFU counts useful work only: the FLOPs of a step taken one rollout at a time, without recomputation and padding. The
share of the bandwidth counts what a decoding step must read: the language model's weights and head once, and the cache.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from common import ROOT, TINY_VLM, Parts, Steps, now, parser, publish, questions, step_parts, table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vismem.config import Config, load_config
from vismem.data.sample import Sample
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Off, Random
from vismem.generation.prompts import encode
from vismem.models.backbones import backbone_of
from vismem.models.processors import load_processor
from vismem.models.vismem import VisMemModel
from vismem.training.stage2 import fit_invocation

Sizes = dict[str, dict[str, Any]]
SEVEN_B: Sizes = {  # config.json of Qwen/Qwen2.5-VL-7B-Instruct, where it differs from its class's defaults
    "text_config": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"hidden_size": 1280},
}  # fmt: skip
TINY: Sizes = {
    "text_config": {
        "vocab_size": 3000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    },
}  # fmt: skip
SHEETS = {  # data sheets: dense bf16 FLOP/s, bytes/s
    "H100 80GB HBM3": (989e12, 3.35e12), "H100 PCIe": (756e12, 2.0e12), "H200": (989e12, 4.8e12),
    "A100-SXM4-80GB": (312e12, 2.04e12), "A100-SXM4-40GB": (312e12, 1.56e12),
}  # fmt: skip


def build(sizes: Sizes, side: int, config: Config) -> VisMemModel:
    """VisMem on a Qwen2.5-VL of these sizes with random weights, in bf16 on a GPU; answers never end by themselves."""
    processor = load_processor(TINY_VLM)
    processor.image_processor = Qwen2VLImageProcessorPil(min_pixels=side**2, max_pixels=side**2)
    ids = processor.tokenizer.get_vocab()
    settings = Qwen2_5_VLConfig(
        **sizes, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    with torch.device(device):
        base = AutoModelForImageTextToText.from_config(settings, dtype=dtype)
    base.generation_config.eos_token_id = ids["<|im_end|>"]
    model = VisMemModel(backbone_of(base, processor), config.memory, config.invocation)
    model.stop_ids = ()
    return model


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


def training(model: VisMemModel, samples: Sequence[Sample], config: Config, args: argparse.Namespace) -> list[Any]:
    """Steps of both stages: seconds, parts, tokens per second, memory, FLOPs."""
    on_gpu, rollouts = torch.cuda.is_available(), args.prompts * args.group
    grpo = config.grpo.model_copy(update={"batch_size": args.prompts, "max_new_tokens": args.tokens})
    plain = grpo.model_copy(update={"micro_batch": 1, "gradient_checkpointing": False})
    stage1 = config.stage1.model_copy(update={"group_size": args.group, "anywhere_after": 0.0})
    stage2 = config.stage2.model_copy(update={"group_size": args.group})
    fit_invocation(model, samples[: args.prompts], stage2, args.tokens, seed=0)
    found = []
    for name, stage in (("stage I", stage1), ("stage II", stage2)):
        with FlopCounterMode(display=False) as counted:
            Steps(model, samples, plain, stage)()
        step = Steps(model, samples, grpo, stage)
        step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with step_parts() as clocks:
            parts = pd.DataFrame([clocks.run(step) for _ in range(args.steps)]).fillna(0.0).mean()
        found.append({
            "stage": name, "seconds": parts.sum(), "parts": parts.sort_values(ascending=False).to_dict(),
            "rollouts": rollouts, "tokens": rollouts * step.metrics["answer_length"], "memories": step.memories,
            "settings": grpo.model_dump() | stage.model_dump(), "flops": counted.get_total_flops(),
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "trained": sum(p.numel() for p in step.trained.values()),
        })  # fmt: skip
    return found


def decoding(model: VisMemModel, samples: Sequence[Sample], args: argparse.Namespace) -> list[Any]:
    """tokens per second and bytes per second at several batch sizes, without memories and with them."""
    text = model.backbone.model.config.text_config
    language = model.backbone.model.model.language_model
    weights = sum(p.numel() * p.element_size() for p in [*language.layers.parameters(), model.backbone.head.weight])
    entry = model.backbone.head.weight.element_size()
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * language.layers[0].self_attn.head_dim * entry
    prompt = int(encode(model.backbone, samples[:1]).mask.sum())

    def answered(batch: int, policy: InvocationPolicy, tokens: int) -> tuple[float, float]:
        chosen = [samples[i % len(samples)] for i in range(batch)]
        answer = partial(generate, model, chosen, policy, temperature=1.0)
        answer(max_new_tokens=2)
        start = now()
        rollouts = answer(max_new_tokens=tokens)
        return now() - start, sum(len(r.invocations) for r in rollouts) / batch

    found = []
    for batch in args.batches:
        first, _ = answered(batch, Off(), 1)
        off, _ = answered(batch, Off(), args.tokens + 1)
        chance = Random(probability=1.0, anywhere=min(1.0, 2 * args.memories / args.tokens), limit=args.memories)
        on, memories = answered(batch, chance, args.tokens + 1)
        step = (off - first) / args.tokens
        read = weights + batch * (prompt + args.tokens / 2) * token
        found.append({"batch": batch, "first_s": first, "step_s": step, "tokens_s": batch / step,
                      "bytes_s": read / step, "memories": memories, "overhead": on / off - 1})  # fmt: skip
    return found


def report(found: dict[str, Any]) -> str:
    """Markdown."""
    flops, bandwidth = found["peak_flops"], found["peak_bandwidth"]
    steps, rows = [], []
    for s in found["training"]:
        memory = f"{s['peak_bytes'] / 2**30:.1f}" if s["peak_bytes"] else "-"
        shares = ", ".join(f"{part} {spent / s['seconds']:.0%}" for part, spent in s["parts"].items())
        speed = f"{s['tokens'] / s['seconds']:.0f} | {s['flops'] / s['seconds'] / flops:.1%} | {memory} | {shares}"
        steps.append(f"{s['stage']} | {s['rollouts']} | {s['memories']:.2f} | {s['seconds']:.2f} | {speed}")
    for d in found["decoding"]:
        speed = f"{1000 * d['step_s']:.2f} | {d['tokens_s']:.0f} | {d['bytes_s'] / bandwidth:.1%}"
        rows.append(f"{d['batch']} | {d['first_s']:.3f} | {speed} | {d['memories']:.2f} | {d['overhead']:+.1%}")
    head = "stage | rollouts | memories per answer | s per step | tokens/s | MFU | peak GiB | where the time goes"
    decode = "batch | first token, s | ms per token | tokens/s | share of bandwidth | memories | time they add"
    source = f"peaks ({found['peaks']}): {flops / 1e12:.3g} TFLOP/s, {bandwidth / 1e12:.3g} TB/s"
    return f"{source}\n\n{table(head, steps)}\n\n{table(decode, rows)}"


def main() -> None:
    """Build, measure, print, write."""
    options = parser(
        __doc__, prompts=(2, "prompts per training step; the paper: 8"), group=(16, "rollouts per prompt [paper: 16]"),
        tokens=(256, "tokens per answer"), memories=(4, "max memories per answer"),
        side=(448, "pixels of an image's side"), steps=(2, "timed training steps, after one that is not"),
    )  # fmt: skip
    options.add_argument("--size", choices=("7b", "tiny"), default="7b")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="batch sizes of decoding")
    args = options.parse_args()
    config = load_config(ROOT / "params.yaml", "qwen2_5_vl_7b")
    limit = config.invocation.model_copy(update={"max_per_answer": args.memories})
    samples = questions(8, args.side)
    model = build(SEVEN_B if args.size == "7b" else TINY, args.side, config.model_copy(update={"invocation": limit}))
    parameters = sum(p.numel() for p in model.backbone.model.parameters())
    found: dict[str, Any] = {**peaks(), "parameters": parameters, "decoding": decoding(model, samples, args)}
    found["training"] = training(model, samples, config, args)
    publish(found, report(found), args.json)


if __name__ == "__main__":
    main()
