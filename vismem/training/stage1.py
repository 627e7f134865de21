"""The step `stage1`: memory formation. The policy is frozen; query builder and both formers are trained (Sec. 3.4)."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from vismem.config import Config, GrpoConfig, Stage1Config, SupervisedConfig
from vismem.data.sample import Sample, read_samples
from vismem.errors import UserError
from vismem.evaluation.answers import score as score_answer
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Off, Random
from vismem.generation.replay import Context, score, without_memory
from vismem.generation.types import MemoryKind, Rollout
from vismem.models.vismem import VisMemModel, load_base
from vismem.training.loop import SECONDS, LoopSettings, Metrics, check_shares, train
from vismem.training.rollout import GrpoObjective, rollout_figures
from vismem.training.supervised import Supervised, answer_with_memory

FORMATION = ("builder.", "short.", "long.")  # the parameters that hold the memory
CHECKED = 256  # validation questions answered for metrics.json


class Formation(GrpoObjective):
    """GRPO with memories at random places; the reference is the same answer without memories."""

    config: Stage1Config

    def policy(self, step: int) -> InvocationPolicy:
        """At delimiters first, later also between them."""
        anywhere = step >= self.config.anywhere_after * steps_of(self.config, len(self.samples))
        return Random(
            probability=self.config.invoke_probability,
            at_start=self.config.at_start,
            anywhere=self.config.anywhere_share if anywhere else 0.0,
        )

    def reference(
        self, context: Context, samples: Sequence[Sample], rollouts: Sequence[Rollout], sample: Tensor
    ) -> Tensor:
        """See GrpoObjective; the policy is frozen, so its reading of the prompts serves here too."""
        bare = [without_memory(rollout) for rollout in rollouts]
        scores = score(self.model, context, bare, sample, temperature=self.config.temperature)
        return scores.text_logprobs[scores.text_mask]


def stage1(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Train the formation of memories; writes the model's own weights, logs and metrics to `out`."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(config.seed)
    backbone = load_base(inputs["base"], config.base.dtype)
    backbone.model.to(accelerator.device)
    model = VisMemModel(backbone, config.memory, config.invocation, config.seed)
    data = inputs["validate"] / "data"
    samples, validation = training_samples(data / "train"), read_samples(data / "validation")
    trained = trainable(model, FORMATION)

    check_shares(min(config.stage1.batch_size, len(samples)), accelerator)  # before the warm start, not after it
    warm = config.stage1.warm_start
    warm_history = train(
        Supervised(
            model,
            samples,
            partial(answer_with_memory, at_start=warm.at_start),
            config.seed,
            accelerator,
            batch_size=warm.batch_size,
            micro_batch=config.stage1.micro_batch,
            gradient_checkpointing=config.stage1.gradient_checkpointing,
        ),
        trained,
        LoopSettings("warm_start", warm.steps, warm.learning_rate, 0.05, warm.matrix_learning_rate),
        out,
        accelerator,
    )
    history = train(
        Formation(model, samples, config.stage1, config.seed, accelerator, out),
        trained,
        loop_settings("stage1", config.stage1, len(samples)),
        out,
        accelerator,
    )
    arms: dict[str, InvocationPolicy] = {
        "vanilla": Off(),
        "short": Random(probability=1.0, kinds=(MemoryKind.SHORT,), limit=1),  # at the answer's start
        "long": Random(probability=1.0, kinds=(MemoryKind.LONG,), limit=1),
    }
    spent = cost(trained, len(samples), (warm_history, warm.batch_size, 0), phase(history, config.stage1))
    metrics = finish(model, validation, arms, config.stage1, config.seed, history, out, accelerator, spent)
    return f"stage1: {len(history)} GRPO steps; validation {describe(metrics)}"


# --- shared with stage II ---


def training_samples(folder: Path) -> list[Sample]:
    """The train split. UserError if it is empty."""
    samples = read_samples(folder)
    if not samples:
        raise UserError(f"{folder} has no rows: name sources with a train split in params.yaml, section prepare")
    return samples


def trainable(model: VisMemModel, prefixes: tuple[str, ...]) -> dict[str, torch.nn.Parameter]:
    """Freeze everything but the parameters whose names start with one of `prefixes`; return those."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def steps_of(config: GrpoConfig | SupervisedConfig, samples: int) -> int:
    """Optimiser batches of a stage: `steps`, or `epochs` passes over the samples."""
    return config.steps or config.epochs * max(1, samples // config.batch_size)


def loop_settings(name: str, config: GrpoConfig, samples: int) -> LoopSettings:
    """The training loop's settings of a stage."""
    names = (
        "learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm", "updates", "target_kl", "checkpoint_every",
    )  # fmt: skip
    return LoopSettings(name, steps_of(config, samples), **{n: getattr(config, n) for n in names})


Phase = tuple[Sequence[Metrics], int, int]  # history, questions a step, rollouts a question (0: supervised)


def phase(history: Sequence[Metrics], config: GrpoConfig) -> Phase:
    """What `cost` has to know of a run of GRPO."""
    return history, config.batch_size, config.group_size


def cost(trained: Mapping[str, torch.nn.Parameter], samples: int, *phases: Phase) -> dict[str, float]:
    """What training took: parameters, questions and sampled rollouts seen, wall seconds; resumed runs included."""
    questions = [len(history) * min(batch, samples) for history, batch, _ in phases]
    groups = [group for _, _, group in phases]
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in trained.values()),
        "train_samples": sum(questions),
        "train_rollouts": sum(count * group for count, group in zip(questions, groups, strict=True)),
        "train_seconds": round(sum(row[SECONDS] for history, _, _ in phases for row in history), 1),
    }


def finish(
    model: VisMemModel,
    validation: Sequence[Sample],
    arms: Mapping[str, InvocationPolicy],
    config: GrpoConfig,
    seed: int,
    history: Sequence[Metrics],
    out: Path,
    accelerator: Accelerator,
    spent: Mapping[str, float],
    save: Callable[[Path], None] | None = None,
) -> dict[str, Metrics]:
    """Answer some validation questions in each arm, and write the model, `metrics.json` and `samples.jsonl`.

    `spent` (see `cost`) goes into the metrics; `save` writes the model, where `save_pretrained` would not.
    """
    checked = list(validation[:CHECKED])
    metrics: dict[str, Metrics] = {}
    lines = []
    for name, policy in arms.items():
        rollouts: list[Rollout] = []
        for at in range(0, len(checked), 64):
            rollouts += generate(
                model, checked[at : at + 64], policy, max_new_tokens=config.max_new_tokens, seed=seed
            )  # fmt: skip
        right = [score_answer(s, r.text) for s, r in zip(checked, rollouts, strict=True)]
        metrics[name] = {"score": 100 * sum(right) / max(1, len(right)), **rollout_figures(rollouts)}
        for sample, rollout, hit in list(zip(checked, rollouts, right, strict=True))[:20]:
            lines.append(
                {"arm": name, "question": sample.question, "reference": sample.answer,
                 "answer": rollout.marked_text, "score": hit}
            )  # fmt: skip
    if accelerator.is_main_process:
        (save or model.save_pretrained)(out)
        (out / "samples.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        last = {key: value for key, value in history[-1].items() if key != SECONDS} if history else {}
        summary = {"validation": metrics, "n": len(checked), "last_step": last, **spent}
        (out / "metrics.json").write_text(json.dumps(summary, indent=1) + "\n")
        for leftover in out.glob("*.checkpoint"):
            leftover.unlink()
    return metrics


def describe(metrics: Mapping[str, Metrics]) -> str:
    """The scores of the arms in one phrase."""
    return ", ".join(f"{name} {figures['score']:.1f} %" for name, figures in metrics.items())
