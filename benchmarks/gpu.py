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
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import Parity, mean_parts, now, parser, processor_for, publish, questions, step_parts, stepper, table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vismem.config import Config, GrpoConfig, GrpoStageConfig, load_config
from vismem.data.sample import Sample
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Off, Random
from vismem.generation.prompts import encode
from vismem.generation.types import Rollout
from vismem.models.backbones import backbone_of
from vismem.models.vismem import VisMemModel
from vismem.training.embedded import SPECIAL_TOKENS
from vismem.training.rollout import GrpoObjective
from vismem.training.run import FORMATION, INVOCATION, trainable
from vismem.training.stage1 import Formation
from vismem.training.stage2 import Invocation, fit_invocation

ROOT = Path(__file__).parents[1]
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


def build(sizes: Sizes, samples: Sequence[Sample], side: int, config: Config) -> VisMemModel:
    """VisMem on a Qwen2.5-VL of these sizes with random weights, in bf16 on a GPU; answers never end by themselves."""
    processor = processor_for(samples)
    processor.image_processor = Qwen2VLImageProcessorPil(min_pixels=side**2, max_pixels=side**2)
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
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


def peaks() -> tuple[float, float, str]:
    """FLOP/s and bytes/s of the device, and where the figures are from: its data sheet, or a measurement here."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for known, (flops, bandwidth) in SHEETS.items():
        if known in name:
            return flops, bandwidth, "data sheet"
    size, dtype = (8192, torch.bfloat16) if name else (1024, torch.float32)
    square = torch.ones(size, size, dtype=dtype, device="cuda" if name else "cpu")
    large = square.repeat(8, 1)

    def fastest(function: Callable[[], object]) -> float:
        return max(min(seconds(function) for _ in range(5)), 1e-9)

    moved = 2 * large.numel() * large.element_size()
    return 2 * size**3 / fastest(lambda: square @ square), moved / fastest(large.clone), "measured"


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = now()
    function()
    return now() - start


class Stage1(Parity, Formation):
    """Stage I with a reward that has spread."""


class Stage2(Parity, Invocation):
    """Stage II with that reward; the swapped answers are decoded as ever."""


def training(model: VisMemModel, samples: Sequence[Sample], config: Config, args: argparse.Namespace) -> list[Any]:
    """Steps of both stages: seconds, parts, tokens per second, memory, FLOPs."""
    grpo = config.grpo.model_copy(update={"batch_size": args.prompts, "max_new_tokens": args.tokens})
    stage1 = config.stage1.model_copy(update={"group_size": args.group, "anywhere_after": 0.0})
    stage2 = config.stage2.model_copy(update={"group_size": args.group})

    def steps(kind: type[GrpoObjective], stage: GrpoStageConfig, prefixes: tuple[str, ...]) -> dict[str, Any]:
        return _steps(model, samples, kind, grpo, stage, trainable(model, prefixes), args.steps)

    found = [{"stage": "stage I", **steps(Stage1, stage1, FORMATION)}]
    fit_invocation(model, samples[: args.prompts], stage2, args.tokens, seed=0)
    return [*found, {"stage": "stage II", **steps(Stage2, stage2, INVOCATION)}]


def _steps(
    model: VisMemModel,
    samples: Sequence[Sample],
    kind: type[GrpoObjective],
    grpo: GrpoConfig,
    stage: GrpoStageConfig,
    trained: dict[str, torch.nn.Parameter],
    count: int,
) -> dict[str, Any]:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    plain = grpo.model_copy(update={"micro_batch": 1, "gradient_checkpointing": False})
    with FlopCounterMode(display=False) as counted:
        stepper(kind(model, samples, plain, stage, 0, accelerator), trained, 0.0)()
    step = stepper(kind(model, samples, grpo, stage, 0, accelerator), trained, 0.0)
    step()
    metrics: dict[str, float] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with step_parts() as clocks:
        mean = mean_parts([clocks.run(lambda: metrics.update(step())) for _ in range(count)])
    rollouts = grpo.batch_size * stage.group_size
    return {
        "seconds": sum(mean.values()), "parts": mean, "rollouts": rollouts,
        "settings": grpo.model_dump() | stage.model_dump(),
        "tokens": rollouts * metrics["answer_length"], "flops": counted.get_total_flops(),
        "memories": metrics["invocations_short"] + metrics["invocations_long"],
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "trained": sum(p.numel() for p in trained.values()),
    }  # fmt: skip


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
        made: list[Rollout] = []
        spent = seconds(lambda: made.extend(answer(max_new_tokens=tokens)))
        return spent, sum(len(r.invocations) for r in made) / batch

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
    steps = [
        [s["stage"], s["rollouts"], f"{s['memories']:.2f}", f"{s['seconds']:.2f}", f"{s['tokens'] / s['seconds']:.0f}",
         f"{s['flops'] / s['seconds'] / flops:.1%}", f"{s['peak_bytes'] / 2**30:.1f}" if s["peak_bytes"] else "-",
         ", ".join(f"{k} {v / s['seconds']:.0%}" for k, v in sorted(s["parts"].items(), key=lambda p: -p[1]))]
        for s in found["training"]
    ]  # fmt: skip
    rows = [
        [d["batch"], f"{d['first_s']:.3f}", f"{1000 * d['step_s']:.2f}", f"{d['tokens_s']:.0f}",
         f"{d['bytes_s'] / bandwidth:.1%}", f"{d['memories']:.2f}", f"{d['overhead']:+.1%}"]
        for d in found["decoding"]
    ]  # fmt: skip
    head = [
        "stage",
        "rollouts",
        "memories per answer",
        "s per step",
        "tokens/s",
        "MFU",
        "peak GiB",
        "where the time goes",
    ]
    decode = ["batch", "first token, s", "ms per token", "tokens/s", "share of bandwidth", "memories", "time they add"]
    source = f"peaks ({found['peaks']}): {flops / 1e12:.3g} TFLOP/s, {bandwidth / 1e12:.3g} TB/s"
    return f"{source}\n\n{table(head, steps)}\n\n{table(decode, rows)}"


def main() -> None:
    """Build, measure, print, write."""
    options = parser(__doc__)
    options.add_argument("--size", choices=("7b", "tiny"), default="7b")
    options.add_argument("--prompts", type=int, default=2, help="prompts per training step; the paper: 8")
    options.add_argument("--group", type=int, default=16, help="rollouts per prompt [paper: 16]")
    options.add_argument("--tokens", type=int, default=256, help="tokens per answer")
    options.add_argument("--memories", type=int, default=4, help="max memories per answer")
    options.add_argument("--side", type=int, default=448, help="pixels of an image's side")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    options.add_argument("--steps", type=int, default=2, help="timed training steps, after one that is not")
    args = options.parse_args()
    config = load_config(ROOT / "params.yaml", "qwen2_5_vl_7b")
    limit = config.invocation.model_copy(update={"max_per_answer": args.memories})
    config = config.model_copy(update={"invocation": limit})
    samples = questions(8, args.side)
    model = build(SEVEN_B if args.size == "7b" else TINY, samples, args.side, config)
    flops, bandwidth, origin = peaks()
    found: dict[str, Any] = {
        "peak_flops": flops, "peak_bandwidth": bandwidth, "peaks": origin,
        "parameters": sum(p.numel() for p in model.backbone.model.parameters()),
        "decoding": decoding(model, samples, args), "training": training(model, samples, config, args),
    }  # fmt: skip
    publish(found, report(found), args.json)


if __name__ == "__main__":
    main()
