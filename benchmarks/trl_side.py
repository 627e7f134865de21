"""TRL's `GRPOTrainer` on the benchmark's prompts: the other side of `grpo_step.py`.

It needs `trl` (1.16), `datasets` and `peft`, which nothing else here does: install them with `pip install --no-deps trl
peft` and `pip install datasets` into an environment beside vismem's, so that torch stays as it is.
"""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from timing import now


def missing() -> str:
    """What keeps TRL's side from running; empty where nothing does."""
    wanted = [name for name in ("trl", "datasets", "peft") if not find_spec(name)]
    return f"not installed: {', '.join(wanted)}" if wanted else ""


def run(
    base: Path,
    rows: list[dict[str, Any]],
    reward: Callable[[list[str]], list[float]],
    *,
    group: int,
    tokens: int,
    steps: int,
    beta: float,
    after: Callable[[float], None],
) -> float:
    """Take `steps` steps over all `rows` ("prompt", "images"); returns sampled tokens an answer.

    `after` is called behind each step with its seconds; what it does is not on TRL's clock.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.since = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.since = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            after(now() - self.since)
            self.since = now()

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=len(rows) * group, num_generations=group,
            max_completion_length=tokens, temperature=1.0, top_k=0, beta=beta, epsilon=0.2, loss_type="grpo",
            learning_rate=1e-5, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(base),
            processing_class=AutoProcessor.from_pretrained(base, backend="pil"),
            reward_funcs=lambda completions, **_: reward([c[0]["content"] for c in completions]),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q_proj|v_proj)"),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return float(trainer.state.log_history[-1]["completions/mean_length"])
