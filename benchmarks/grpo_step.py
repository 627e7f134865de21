"""What a GRPO step costs: ours with memory off against TRL's `GRPOTrainer`, and stage I as a multiple of ours.

    python benchmarks/grpo_step.py [--base FOLDER] [--steps 5] [--json FILE]

Same base, prompts, group size and lengths; LoRA of rank 16 on the policy's q_proj and v_proj, KL to the base; one
thread. The steps of all sides take turns in one process; seconds are the process's own, so that what else runs on the
machine counts little, and ratios are medians over turns. Peak memory: of a process of its own for each side, on top of
what it held before the first step. Without --base an untrained embedded base is built.

TRL's side needs `trl` (1.16), `datasets` and `peft`, which nothing else here does (README.md says how to install them);
where they are missing, it is left out.
"""

import argparse
import io
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
from accelerate import Accelerator
from common import (
    Parity,
    mean_parts,
    now,
    parser,
    peak_mib,
    publish,
    questions,
    random_base,
    step_parts,
    stepper,
    table,
)
from PIL import Image
from transformers import AutoModelForImageTextToText

from vismem.config import GrpoConfig, GrpoStageConfig, InvocationConfig, MemoryConfig, Stage1Config
from vismem.data.sample import Sample
from vismem.models.vismem import VisMemModel, load_base
from vismem.training.baselines import PolicyGrpo
from vismem.training.run import FORMATION, trainable
from vismem.training.stage1 import Formation

OURS, TRL, STAGE1 = "ours, memory off", "TRL GRPOTrainer", "ours, stage I"
Step = Callable[[], dict[str, float]]


class MemoryOff(Parity, PolicyGrpo):
    """GRPO of the policy's adapter."""


class Stage1(Parity, Formation):
    """Stage I."""


def our_step(base: Path, samples: Sequence[Sample], args: argparse.Namespace, side: str) -> Step:
    """One step of ours: sample, score, update. Returns a function that takes a step and returns its metrics."""
    model = VisMemModel(load_base(base), MemoryConfig(), InvocationConfig(max_per_answer=args.memories))
    accelerator = Accelerator(cpu=True)
    micro_batch = args.prompts * args.group
    grpo = GrpoConfig(batch_size=args.prompts, max_new_tokens=args.tokens, micro_batch=micro_batch)
    if side == STAGE1:
        settings = Stage1Config(group_size=args.group, anywhere_after=0.0)
        return stepper(Stage1(model, samples, grpo, settings, 0, accelerator), trainable(model, FORMATION), 1e-5)
    model.policy_lora.enabled = True
    memory_off = MemoryOff(model, samples, grpo, GrpoStageConfig(group_size=args.group), 0, accelerator)
    memory_off.prompts_need_gradient = True
    return stepper(memory_off, trainable(model, ("policy_lora.",)), 1e-5)


def missing_for_trl() -> str:
    """What TRL's side needs and is not installed; empty where nothing is missing."""
    wanted = [name for name in ("trl", "datasets", "peft") if not find_spec(name)]
    return f"not installed: {', '.join(wanted)}" if wanted else ""


def trl_steps(
    base: Path, samples: Sequence[Sample], args: argparse.Namespace, *, steps: int, after: Callable[[float], None]
) -> float:
    """Take `steps` steps over all samples; returns sampled tokens per answer.

    `after` is called behind each step with its seconds; what it does is not on TRL's clock. The reward costs nothing
    and has spread: whether the sum of an answer's characters is odd.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoProcessor, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.since = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.since = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            after(now() - self.since)
            self.since = now()

    def reward(completions: Any, **_: Any) -> list[float]:
        return [float(sum(map(ord, completion[0]["content"])) % 2) for completion in completions]

    rows = [
        {"prompt": [{"role": "user", "content": s.question}],
         "images": [Image.open(io.BytesIO(data)).convert("RGB") for data in s.images]}
        for s in samples
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=len(rows) * args.group,
            num_generations=args.group, max_completion_length=args.tokens, temperature=1.0, top_k=0,
            beta=GrpoStageConfig().kl_coefficient, epsilon=0.2, loss_type="grpo",
            learning_rate=1e-5, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(base),
            processing_class=AutoProcessor.from_pretrained(base, backend="pil"),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q_proj|v_proj)"),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return float(trainer.state.log_history[-1]["completions/mean_length"])


def peaks(base: Path, samples: Sequence[Sample], args: argparse.Namespace, sides: Sequence[str]) -> dict[str, float]:
    """MiB that two steps of each side take on top of its weights."""

    def ours(side: str) -> Callable[[], object]:
        step = our_step(base, samples, args, side)
        return lambda: (step(), step())

    def theirs() -> Callable[[], object]:
        held = [AutoModelForImageTextToText.from_pretrained(base)]

        def work() -> None:
            held.clear()
            trl_steps(base, samples, args, steps=2, after=lambda seconds: None)

        return work

    return {side: peak_mib(theirs if side == TRL else partial(ours, side)) for side in sides}


def compare(base: Path, samples: Sequence[Sample], args: argparse.Namespace, with_trl: bool) -> dict[str, Any]:
    """Steps of all sides in turn: seconds of each, the parts of ours, tokens and memories per answer."""
    steps = {name: our_step(base, samples, args, name) for name in (OURS, STAGE1)}
    theirs: list[float] = []
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    last: dict[str, dict[str, float]] = {}
    with step_parts() as clocks:

        def turn(name: str) -> None:
            last[name] = steps[name]()

        def ours(trl_seconds: float | None = None) -> None:
            theirs.extend([] if trl_seconds is None else [trl_seconds])
            for name in steps:
                parts[name].append(clocks.run(partial(turn, name)))

        lengths = {}
        if with_trl:
            lengths[TRL] = trl_steps(base, samples, args, steps=args.steps + 1, after=ours)
        else:
            for _ in range(args.steps + 1):
                ours()
    seconds = {name: [sum(step.values()) for step in parts[name]] for name in steps}
    if with_trl:
        seconds = {OURS: seconds[OURS], TRL: theirs, STAGE1: seconds[STAGE1]}
    return {
        "seconds": {name: values[1:] for name, values in seconds.items()},
        "parts": {name: mean_parts(values[1:]) for name, values in parts.items()},
        "tokens": lengths | {name: figures["answer_length"] for name, figures in last.items()},
        "memories": {n: sum(v for k, v in f.items() if k.startswith("invocations")) for n, f in last.items()},
    }


def report(found: dict[str, Any]) -> str:
    """Markdown: sides, and where our time goes."""
    seconds, parts = found["seconds"], found["parts"]
    compared = [name for name in (TRL, OURS) if name in seconds]
    rows = []
    for name, values in seconds.items():
        ratios = [statistics.median(a / b for a, b in zip(values, seconds[to], strict=True)) for to in compared]
        rows.append(
            [name, f"{statistics.median(values):.2f}", *(f"{ratio:.2f}" for ratio in ratios),
             f"{found['tokens'][name]:.1f}", f"{found['memories'].get(name, 0):.2f}", f"{found['peak_mib'][name]:.0f}"]
        )  # fmt: skip
    times = [f"times {name}" for name in compared]
    sides = table(["side", "s per step", *times, "tokens per answer", "memories per answer", "peak MiB"], rows)

    def share(name: str, key: str) -> str:
        spent = parts[name].get(key, 0.0)
        return f"{spent:.2f} s, {spent / sum(parts[name].values()):.0%}"

    names = sorted({k for values in parts.values() for k in values}, key=lambda k: -parts[STAGE1].get(k, 0.0))
    shares = [[key, *(share(name, key) for name in parts)] for key in names]
    return f"{sides}\n\n{table(['where the time goes', *parts], shares)}"


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__)
    options.add_argument("--base", type=Path, help="folder of a base in Hugging Face format; default: built untrained")
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--group", type=int, default=16)
    options.add_argument("--tokens", type=int, default=56, help="longest answer")
    options.add_argument("--memories", type=int, default=2, help="max memories per answer, in stage I")
    options.add_argument("--steps", type=int, default=5, help="timed steps of each side, after one that is not")
    args = options.parse_args()
    missing = missing_for_trl()
    torch.set_num_threads(1)
    if missing:
        print(f"TRL's side is left out ({missing}).\n")
    with tempfile.TemporaryDirectory() as folder:
        samples = questions(args.prompts)
        base = args.base or random_base(Path(folder), samples)
        sides = [OURS, STAGE1] if missing else [OURS, TRL, STAGE1]
        peak = peaks(base, samples, args, sides)
        found = {"peak_mib": peak, **compare(base, samples, args, with_trl=not missing)}
    publish(found, report(found), args.json)


if __name__ == "__main__":
    main()
