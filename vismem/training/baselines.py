"""The baselines: fine-tuning of the same base with the same data, engine, rewards and training loop as VisMem.

`sft_lora` and `grpo_lora` train a LoRA of the policy on q_proj and v_proj, the `matched` ones a LoRA with as many
parameters as VisMem's formation. `full` trains the language model with its embeddings and head. The vision encoder and
the projector stay frozen, as in VisMem, so every arm is given the same image features.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from transformers import AutoProcessor

from vismem.config import Config
from vismem.data.sample import read_samples
from vismem.generation.invocation import InvocationPolicy, Off
from vismem.models.lora import LoraSettings, LoraTarget
from vismem.models.vismem import VisMemModel, load_base
from vismem.training.loop import LoopSettings, train
from vismem.training.rollout import GrpoObjective
from vismem.training.stage1 import (
    FORMATION,
    Phase,
    cost,
    describe,
    finish,
    loop_settings,
    phase,
    steps_of,
    trainable,
    training_samples,
)
from vismem.training.stage2 import POLICY_LORA
from vismem.training.supervised import Supervised, plain_answer

Inputs = Mapping[str, Path]
Parameters = Mapping[str, nn.Parameter]


def sft_lora(config: Config, inputs: Inputs, out: Path) -> str:
    """A LoRA of rank `baselines.rank` learns the reference answers."""
    return _train_lora("sft_lora", config, inputs, out)


def sft_lora_matched(config: Config, inputs: Inputs, out: Path) -> str:
    """A LoRA of the size of VisMem's formation learns the reference answers."""
    return _train_lora("sft_lora_matched", config, inputs, out)


def grpo_lora(config: Config, inputs: Inputs, out: Path) -> str:
    """A LoRA of rank `baselines.rank` is trained by GRPO."""
    return _train_lora("grpo_lora", config, inputs, out)


def grpo_lora_matched(config: Config, inputs: Inputs, out: Path) -> str:
    """A LoRA of the size of VisMem's formation is trained by GRPO."""
    return _train_lora("grpo_lora_matched", config, inputs, out)


def full(config: Config, inputs: Inputs, out: Path) -> str:
    """The language model, embeddings and head learn the reference answers; `out` becomes a Hugging Face folder."""
    run = _Run("full", config, inputs, out)
    base = run.model.backbone
    modules = nn.ModuleDict({"language_model": base.model.model.language_model, "lm_head": base.head})
    trained = dict(modules.requires_grad_(True).named_parameters())  # weights that both share, once
    run.say(trained, "the whole language model")
    done = run.supervised(trained, config.baselines.supervised.full_learning_rate)

    def save(folder: Path) -> None:
        base.model.save_pretrained(folder)
        AutoProcessor.from_pretrained(inputs["base"]).save_pretrained(folder)

    return run.finish(trained, done, save)


def _train_lora(name: str, config: Config, inputs: Inputs, out: Path) -> str:
    settings = config.baselines
    run = _Run(name, config, inputs, out)
    if name.endswith("_matched"):
        adapter = matched_lora(run.model, settings.alpha / settings.rank, settings.dropout)
    else:
        adapter = LoraSettings(settings.rank, settings.alpha, settings.dropout)
    run.model.set_policy_lora(adapter)
    run.model.policy_lora.enabled = True
    trained = trainable(run.model, POLICY_LORA)
    run.say(trained, f"LoRA of rank {adapter.rank} on {'all linear layers' if adapter.every_linear else 'q and v'}")
    supervised = name.startswith("sft")
    done = run.supervised(trained, settings.supervised.learning_rate) if supervised else run.grpo(trained)
    return run.finish(trained, done)


class PolicyGrpo(GrpoObjective):
    """GRPO of the policy's own adapter, without memory. The reference is the base: the same policy, adapter off."""

    def policy(self, step: int) -> InvocationPolicy:
        """No memory."""
        return Off()


def matched_lora(model: VisMemModel, scale: float, dropout: float) -> LoraSettings:
    """The LoRA (alpha / r is `scale`) with as many parameters as VisMem's query builder and both formers, or nearly so.

    It stands on q_proj and v_proj. Where their rank would exceed their width, so that a part of the parameters would
    be idle, it stands on all linear layers of the language model.
    """
    wanted = _count(weight for name, weight in model.named_parameters() if name.startswith(FORMATION))
    for every_linear in (False, True):
        targets = model.backbone.language_targets(every_linear)
        rank = max(1, round(wanted / sum(sum(_sides(target)) for target in targets)))
        if rank <= min(min(_sides(target)) for target in targets):
            break
    return LoraSettings(rank, scale * rank, dropout, every_linear)


def _sides(target: LoraTarget) -> tuple[int, int]:
    return target.module.in_features, target.stop - target.start


def _count(weights: Iterable[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights)


class _Run:
    """The same beginning and end for every baseline: VisMem's model on the base, its data, its metrics."""

    def __init__(self, name: str, config: Config, inputs: Inputs, out: Path) -> None:
        self.name, self.config, self.out = name, config, out
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        torch.manual_seed(config.seed)
        backbone = load_base(inputs["base"], config.base.dtype)
        backbone.model.to(self.accelerator.device)
        self.model = VisMemModel(backbone, config.memory, config.invocation, config.seed)
        data = inputs["validate"] / "data"
        self.samples, self.validation = training_samples(data / "train"), read_samples(data / "validation")

    def say(self, trained: Parameters, what: str) -> None:
        """Print how much is trained."""
        if self.accelerator.is_main_process:
            Console(stderr=True).print(f"{self.name}: trains {_count(trained.values()):,} parameters, {what}")

    def supervised(self, trained: Parameters, rate: float) -> Phase:
        """Train on the reference answers."""
        settings = self.config.baselines.supervised
        objective = Supervised(
            self.model,
            self.samples,
            plain_answer,
            self.config.seed,
            self.accelerator,
            batch_size=settings.batch_size,
            micro_batch=settings.micro_batch,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        objective.prompts_need_gradient = True
        loop = LoopSettings(
            self.name,
            steps_of(settings, len(self.samples)),
            rate,
            settings.warmup_ratio,
            weight_decay=settings.weight_decay,
            checkpoint_every=settings.checkpoint_every,
        )
        return train(objective, trained, loop, self.out, self.accelerator), settings.batch_size, 0

    def grpo(self, trained: Parameters) -> Phase:
        """Train by GRPO."""
        settings = self.config.baselines.grpo
        objective = PolicyGrpo(self.model, self.samples, settings, self.config.seed, self.accelerator, self.out)
        objective.prompts_need_gradient = True
        loop = loop_settings(self.name, settings, len(self.samples))
        return phase(train(objective, trained, loop, self.out, self.accelerator), settings)

    def finish(self, trained: Parameters, done: Phase, save: Callable[[Path], None] | None = None) -> str:
        """Answer validation questions, write model and metrics, and say it in one line."""
        metrics = finish(
            self.model,
            self.validation,
            {self.name: Off()},
            self.config.baselines.grpo,
            self.config.seed,
            done[0],
            self.out,
            self.accelerator,
            cost(trained, len(self.samples), done),
            save,
        )
        kind = "GRPO" if done[2] else "supervised"
        return (
            f"{self.name}: {len(done[0])} {kind} steps of {_count(trained.values()):,} parameters; "
            f"validation {describe(metrics)}"
        )
