"""What a GRPO step costs: ours with memory off against TRL's `GRPOTrainer`, and stage I as a multiple of ours.

    python benchmarks/grpo_step.py [--base FOLDER] [--steps 5] [--json FILE]

Same base, prompts, group size and lengths; LoRA of rank 16 on the policy's q_proj and v_proj, KL to the base; one
thread. The steps of all sides take turns in one process; seconds are the process's own, so that what else runs on the
machine counts little, and ratios are medians over turns. Peak memory: of a process of its own for each side, on top of
what it held before the first step. Without --base an untrained embedded base is built.

TRL's side needs what `trl_side.py` names; where that is missing, it is left out.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
import trl_side
from accelerate import Accelerator
from PIL import Image
from timing import machine, step_parts, table
from torch import Tensor

from vismem.config import (
    BaseConfig,
    GrpoConfig,
    GrpoStageConfig,
    InvocationConfig,
    MemoryConfig,
    ScenesSource,
    Stage1Config,
)
from vismem.data.collate import target_text
from vismem.data.sample import Sample
from vismem.data.scenes import generate as scenes
from vismem.generation.types import Rollout
from vismem.models.vismem import VisMemModel, load_base
from vismem.training.baselines import PolicyGrpo
from vismem.training.embedded import build_model, build_processor
from vismem.training.rollout import GrpoObjective
from vismem.training.run import FORMATION, trainable
from vismem.training.stage1 import Formation

OURS, TRL, STAGE1 = "ours, memory off", "TRL GRPOTrainer", "ours, stage I"


class MemoryOff(PolicyGrpo):
    """GRPO of the policy's adapter with a reward that has spread on an untrained base too."""

    def shaped(self, rewards: Tensor, batch: Sequence[Sample], rollouts: Sequence[Rollout], step: int) -> Tensor:
        return parity([r.text for r in rollouts]).view_as(rewards)


class Stage1(Formation):
    """Stage I with the same reward."""

    def shaped(self, rewards: Tensor, batch: Sequence[Sample], rollouts: Sequence[Rollout], step: int) -> Tensor:
        return parity([r.text for r in rollouts]).view_as(rewards)


def parity(texts: Sequence[str]) -> Tensor:
    """A reward that costs nothing: whether the characters' sum is odd."""
    return torch.tensor([float(sum(map(ord, text)) % 2) for text in texts])


def save_base(folder: Path, samples: Sequence[Sample], size: BaseConfig) -> Path:
    """An untrained embedded base whose answers wander."""
    processor = build_processor(text for s in samples for text in (s.question, target_text(s)))
    model = build_model(size, processor, seed=0)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.3 / size.hidden_size**0.5 * 3, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def our_step(
    base: Path, samples: Sequence[Sample], args: argparse.Namespace, kind: str
) -> Callable[[], dict[str, float]]:
    """One step of ours: sample, score, update. Returns a function that takes a step and returns its metrics."""
    model = VisMemModel(load_base(base), MemoryConfig(), InvocationConfig(max_per_answer=args.memories))
    accelerator = Accelerator(cpu=True)
    micro_batch = args.prompts * args.group
    grpo = GrpoConfig(batch_size=args.prompts, max_new_tokens=args.tokens, micro_batch=micro_batch)
    objective: GrpoObjective
    if kind == STAGE1:
        stage1 = Stage1Config(group_size=args.group, anywhere_after=0.0)
        trained = trainable(model, FORMATION)
        objective = Stage1(model, samples, grpo, stage1, 0, accelerator)
    else:
        trained = trainable(model, ("policy_lora.",))
        model.policy_lora.enabled = True
        stage = GrpoStageConfig(group_size=args.group)
        objective = MemoryOff(model, samples, grpo, stage, 0, accelerator)
        objective.prompts_need_gradient = True
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5)
    at = iter(range(10**9))

    def step() -> dict[str, float]:
        batch = objective.collect(next(at))
        optimizer.zero_grad()
        metrics = objective.backward(batch)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        return metrics

    return step


def trl_steps(base: Path, samples: Sequence[Sample], args: argparse.Namespace, after: Callable[[float], None]) -> float:
    """See trl_side.run."""
    rows = [
        {"prompt": [{"role": "user", "content": s.question}],
         "images": [Image.open(io.BytesIO(data)).convert("RGB") for data in s.images]}
        for s in samples
    ]  # fmt: skip
    return trl_side.run(
        base, rows, lambda texts: parity(texts).tolist(), group=args.group, tokens=args.tokens, steps=args.steps + 1,
        beta=GrpoStageConfig().kl_coefficient, after=after,
    )  # fmt: skip


def peak(base: Path, samples: Sequence[Sample], args: argparse.Namespace) -> float:
    """MiB that the steps of one side took on top of its weights. For a process of its own: a peak never falls."""
    held = 0.0
    if args.peak == TRL:
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(base)
        held = _memory("VmRSS")
        del model
        trl_steps(base, samples, args, lambda seconds: None)
    else:
        step = our_step(base, samples, args, args.peak)
        held = _memory("VmRSS")
        for _ in range(args.steps + 1):
            step()
    return _memory("VmHWM") - held


def _memory(line: str) -> float:
    """MiB of this process: "VmRSS" now, "VmHWM" at most (getrusage would count what ran before exec too)."""
    return float(Path("/proc/self/status").read_text().split(line + ":")[1].split()[0]) / 1024


def compare(base: Path, samples: Sequence[Sample], args: argparse.Namespace) -> dict[str, Any]:
    """Steps of all sides in turn: seconds of each, the parts of ours, tokens and memories an answer."""
    steps = {name: our_step(base, samples, args, name) for name in (OURS, STAGE1)}
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, TRL, STAGE1)}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    last: dict[str, dict[str, float]] = {}
    clocks = step_parts()

    def turn(trl_seconds: float | None = None) -> None:
        if trl_seconds is not None:
            seconds[TRL].append(trl_seconds)
        for name, step in steps.items():
            parts[name].append(clocks.run(lambda name=name, step=step: last.update({name: step()})))  # type: ignore[misc]
            seconds[name].append(sum(parts[name][-1].values()))

    lengths = {}
    if args.reason:
        for _ in range(args.steps + 1):
            turn()
    else:
        lengths[TRL] = trl_steps(base, samples, args, turn)
    clocks.close()
    lengths |= {name: figures["answer_length"] for name, figures in last.items()}
    memories = {
        name: sum(v for k, v in figures.items() if k.startswith("invocations")) for name, figures in last.items()
    }
    return {
        "seconds": {name: values[1:] for name, values in seconds.items() if values},
        "parts": {name: _mean(values[1:]) for name, values in parts.items()},
        "tokens": lengths,
        "memories": memories,
    }


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {
        key: statistics.mean(row.get(key, 0.0) for row in rows) for key in dict.fromkeys(k for r in rows for k in r)
    }


def report(found: dict[str, Any]) -> str:
    """Markdown: sides, and where our time goes."""
    seconds, parts = found["seconds"], found["parts"]
    compared = [name for name in (TRL, OURS) if name in seconds]
    rows = []
    for name, values in seconds.items():
        ratios = [statistics.median(a / b for a, b in zip(values, seconds[to], strict=True)) for to in compared]
        peak_mib = found["peak_mib"].get(name)
        rows.append(
            [name, f"{statistics.median(values):.2f}", *(f"{ratio:.2f}" for ratio in ratios),
             f"{found['tokens'][name]:.1f}", f"{found['memories'].get(name, 0):.2f}",
             "-" if peak_mib is None else f"{peak_mib:.0f}"]
        )  # fmt: skip
    times = [f"times {name}" for name in compared]
    sides = table(["side", "s a step", *times, "tokens an answer", "memories an answer", "peak MiB"], rows)
    names = sorted({k for values in parts.values() for k in values}, key=lambda k: -parts[STAGE1].get(k, 0.0))
    shares = [[key, *(_share(values, key) for values in parts.values())] for key in names]
    return f"{sides}\n\n{table(['where the time goes', *parts], shares)}"


def _share(parts: dict[str, float], key: str) -> str:
    return f"{parts.get(key, 0.0):.2f} s, {parts.get(key, 0.0) / sum(parts.values()):.0%}"


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of a base in Hugging Face format; default: built untrained")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=56, help="longest answer")
    parser.add_argument("--memories", type=int, default=2, help="memories an answer at most, in stage I")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, after one that is not")
    parser.add_argument("--no-peak", action="store_true", help="leave out peak memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.reason = trl_side.missing()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        every = list(scenes(ScenesSource(train=64, validation=0, test=0, pretrain=0), "train", seed=0))
        samples = [s for s in every if len(s.images) == 1][: args.prompts]
        base = args.base or save_base(Path(folder), every, BaseConfig())
        if args.peak:
            print(peak(base, samples, args))
            return
        if args.reason:
            print(f"TRL's side is left out ({args.reason}).\n")
        found = compare(base, samples, args)
        found["peak_mib"] = {}
        for name in () if args.no_peak else found["seconds"]:
            command = [sys.executable, __file__, *sys.argv[1:], "--steps", "1", "--base", str(base), "--peak", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found["peak_mib"][name] = float(output.split()[-1])
    found |= {"machine": machine(), "command": " ".join(["python", "benchmarks/grpo_step.py", *sys.argv[1:]])}
    print(f"{found['machine']}\n`{found['command']}`\n\n{report(found)}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
