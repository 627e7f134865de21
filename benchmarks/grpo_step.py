"""What a GRPO step costs: ours with memory off against TRL's `GRPOTrainer`, and stage I as a multiple of ours.

    python benchmarks/grpo_step.py [--base FOLDER] [--steps 5] [--json FILE]

Same base, prompts, group size and lengths; LoRA of rank 16 on the policy's q_proj and v_proj, KL to the base; one
thread. The steps of all sides take turns in one process; seconds are the process's own, so that what else runs on the
machine counts little, and ratios are medians over turns. Peak memory: of a process of its own for each side, on top of
what it held before the first step. Without --base it is the tiny VLM with a random head.

TRL's side needs `trl` (1.16), `datasets` and `peft`, which nothing else here does (README.md says how to install them);
where they are missing, it is left out.
"""

import argparse
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import pandas as pd
import torch
from common import Steps, now, parser, peak_mib, publish, questions, random_base, step_parts, table
from PIL import Image
from transformers import AutoModelForImageTextToText

from vismem.config import GrpoConfig, GrpoStageConfig, InvocationConfig, MemoryConfig, Stage1Config
from vismem.data.sample import Sample
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel

OURS, TRL, STAGE1 = "ours, memory off", "TRL GRPOTrainer", "ours, stage I"
MISSING = [name for name in ("trl", "datasets", "peft") if not find_spec(name)]  # of what TRL's side needs


def our_steps(base: Path, samples: Sequence[Sample], args: argparse.Namespace, side: str) -> Steps:
    """The steps of a side of ours."""
    model = VisMemModel(load_base(base), MemoryConfig(), InvocationConfig(max_per_answer=args.memories))
    micro_batch = args.prompts * args.group
    grpo = GrpoConfig(batch_size=args.prompts, max_new_tokens=args.tokens, micro_batch=micro_batch)
    stage1, memory_off = Stage1Config(group_size=args.group, anywhere_after=0.0), GrpoStageConfig(group_size=args.group)
    return Steps(model, samples, grpo, stage1 if side == STAGE1 else memory_off)


def trl_steps(
    base: Path, samples: Sequence[Sample], args: argparse.Namespace, steps: int, after: Callable[[float], None]
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
        since = 0.0

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


def two_steps(base: Path, samples: Sequence[Sample], args: argparse.Namespace, side: str) -> Callable[[], object]:
    """A function that takes two steps of a side, whose weights have been loaded."""
    if side != TRL:
        step = our_steps(base, samples, args, side)
        return lambda: (step(), step())
    held = [AutoModelForImageTextToText.from_pretrained(base)]

    def theirs() -> None:
        held.clear()
        trl_steps(base, samples, args, 2, after=lambda seconds: None)

    return theirs


def compare(base: Path, samples: Sequence[Sample], args: argparse.Namespace, sides: Sequence[str]) -> dict[str, Any]:
    """Steps of all sides in turn: seconds of each, the parts of ours, tokens and memories per answer."""
    steps = {name: our_steps(base, samples, args, name) for name in (OURS, STAGE1)}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with step_parts() as clocks:

        def turn(trl_seconds: float | None = None) -> None:
            if trl_seconds is not None:
                seconds[TRL].append(trl_seconds)
            for name, step in steps.items():
                parts[name].append(clocks.run(step))
                seconds[name].append(sum(parts[name][-1].values()))

        lengths = {} if MISSING else {TRL: trl_steps(base, samples, args, args.steps + 1, turn)}
        for _ in range(args.steps + 1 if MISSING else 0):
            turn()
    return {
        "seconds": {name: values[1:] for name, values in seconds.items()},
        "parts": {name: pd.DataFrame(runs[1:]).fillna(0.0).mean().to_dict() for name, runs in parts.items()},
        "tokens": lengths | {name: step.metrics["answer_length"] for name, step in steps.items()},
        "memories": {name: step.memories for name, step in steps.items()},
    }


def report(found: dict[str, Any]) -> str:
    """Markdown: sides, and where our time goes."""
    seconds, parts = pd.DataFrame(found["seconds"]), pd.DataFrame(found["parts"]).fillna(0.0)
    compared = [name for name in (TRL, OURS) if name in seconds]
    rows = []
    for name in seconds:
        times = " | ".join(f"{(seconds[name] / seconds[to]).median():.2f}" for to in compared)
        answers = f"{found['tokens'][name]:.1f} | {found['memories'].get(name, 0):.2f}"
        rows.append(f"{name} | {seconds[name].median():.2f} | {times} | {answers} | {found['peak_mib'][name]:.0f}")
    times = " | ".join(f"times {name}" for name in compared)
    sides = table(f"side | s per step | {times} | tokens per answer | memories per answer | peak MiB", rows)
    shares = [
        " | ".join([part, *(f"{spent:.2f} s, {spent / parts[name].sum():.0%}" for name, spent in row.items())])
        for part, row in parts.sort_values(STAGE1, ascending=False).iterrows()
    ]
    return f"{sides}\n\n{table(' | '.join(['where the time goes', *parts]), shares)}"


def main() -> None:
    """Measure, print, write."""
    options = parser(
        __doc__, prompts=(8, "prompts per step"), group=(16, "rollouts per prompt"), tokens=(56, "longest answer"),
        memories=(2, "max memories per answer, in stage I"),
        steps=(5, "timed steps of each side, after one that is not"),
    )  # fmt: skip
    options.add_argument(
        "--base", type=Path, help="folder of a base in Hugging Face format (default: the tiny VLM with a random head)"
    )
    args = options.parse_args()
    torch.set_num_threads(1)
    if MISSING:
        print(f"TRL's side is left out (not installed: {', '.join(MISSING)}).\n")
    with tempfile.TemporaryDirectory() as folder:
        samples = questions(args.prompts)
        base = args.base or random_base(Path(folder))
        sides = [OURS, STAGE1] if MISSING else [OURS, TRL, STAGE1]
        peak = {side: peak_mib(partial(two_steps, base, samples, args, side)) for side in sides}
        found = {"peak_mib": peak, **compare(base, samples, args, sides)}
    publish(found, report(found), args.json)


if __name__ == "__main__":
    main()
