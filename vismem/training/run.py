"""One step of training from its inputs to its metrics: what stage I, stage II and the baselines share."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from vismem.config import Config, GrpoStageConfig
from vismem.data.sample import Sample, read_samples
from vismem.errors import UserError
from vismem.evaluation.answers import score
from vismem.files import write_json, write_text
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy
from vismem.models.vismem import VisMemModel, load_base
from vismem.training.loop import SECONDS, LoopSettings, Metrics, Objective, train
from vismem.training.rollout import GrpoObjective, rollout_figures

FORMATION = ("builder.", "short.", "long.")  # prefixes of the parameters that stage I trains
INVOCATION = ("tokens.",)  # and stage II
POLICY_LORA = ("policy_lora.",)  # and stage II with `policy_lora`, and the LoRA baselines
CHECKED = 256  # validation questions answered for metrics.json
LOGGED = 20  # of them in samples.jsonl, per arm
BATCH = 64  # answered at a time

Inputs = Mapping[str, Path]
Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Phase:
    """One training loop that has ended: its history, questions per step, rollouts per question (0: supervised)."""

    history: Sequence[Metrics]
    batch_size: int
    group_size: int = 0


class Run:
    """Device, data, model and the phases of training so far. `model` loads the model from the inputs.

    UserError for a train split without rows.
    """

    def __init__(
        self, name: str, config: Config, inputs: Inputs, out: Path, model: Callable[[Config, Inputs], VisMemModel]
    ) -> None:
        self.name, self.config, self.out = name, config, out
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        torch.manual_seed(config.seed)
        data = inputs["validate"] / "data"
        self.samples, self.validation = read_samples(data / "train"), read_samples(data / "validation")
        if not self.samples:
            raise UserError(
                f"{data / 'train'} has no rows: name sources with a train split in params.yaml, section prepare"
            )
        self.model = model(config, inputs)
        self.model.backbone.model.to(self.accelerator.device)
        self.model.to(self.accelerator.device)
        self.phases: list[Phase] = []

    def train(
        self,
        objective: Objective,
        trained: Parameters,
        settings: LoopSettings,
        batch_size: int,
        group_size: int = 0,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        """Run one phase; see `loop.train`."""
        history = train(objective, trained, settings, self.out, self.accelerator, lr_scales)
        self.phases.append(Phase(history, batch_size, group_size))

    def train_grpo(
        self, objective: GrpoObjective, trained: Parameters, lr_scales: Mapping[str, float] | None = None
    ) -> None:
        """Run one phase of GRPO with the objective's own settings."""
        settings = loop_settings(self.name, self.config, objective.stage, len(self.samples))
        self.train(
            objective, trained, settings, self.config.grpo.batch_size, objective.stage.group_size, lr_scales
        )  # fmt: skip

    def finish(
        self,
        arms: Mapping[str, InvocationPolicy],
        trained: Parameters,
        save: Callable[[Path], None] | None = None,
    ) -> str:
        """Answer validation questions in each arm; write the model, `metrics.json` and `samples.jsonl`.

        `save` writes the model, where `save_pretrained` would not. Returns steps and scores in one line.
        """
        checked = self.validation[:CHECKED]
        metrics: dict[str, Metrics] = {}
        lines: list[str] = []
        for name, policy in arms.items():
            metrics[name], answers = self._answer(checked, policy)
            lines += [json.dumps({"arm": name, **answer}, ensure_ascii=False) + "\n" for answer in answers]
        history = self.phases[-1].history
        if self.accelerator.is_main_process:
            (save or self.model.save_pretrained)(self.out)
            write_text(self.out / "samples.jsonl", "".join(lines))
            last = {key: value for key, value in history[-1].items() if key != SECONDS} if history else {}
            summary = {"validation": metrics, "n": len(checked), "last_step": last}
            write_json(self.out / "metrics.json", {**summary, **cost(trained, len(self.samples), self.phases)})
            for leftover in self.out.glob("*.checkpoint"):
                leftover.unlink()
        kind = "GRPO" if self.phases[-1].group_size else "supervised"
        scores = ", ".join(f"{name} {figures['score']:.1f} %" for name, figures in metrics.items())
        return f"{self.name}: {len(history)} {kind} steps of {count(trained):,} parameters; validation {scores}"

    def _answer(self, samples: Sequence[Sample], policy: InvocationPolicy) -> tuple[Metrics, list[dict[str, object]]]:
        """The figures of greedy answers, and the first `LOGGED` of them."""
        rollouts = []
        for at in range(0, len(samples), BATCH):
            batch = samples[at : at + BATCH]
            limit = self.config.grpo.max_new_tokens
            rollouts += generate(self.model, batch, policy, max_new_tokens=limit, seed=self.config.seed)
        right = [score(sample, rollout.text) for sample, rollout in zip(samples, rollouts, strict=True)]
        answers = [
            {"question": s.question, "reference": s.answer, "answer": r.marked_text, "score": hit}
            for s, r, hit in zip(samples[:LOGGED], rollouts[:LOGGED], right[:LOGGED], strict=True)
        ]
        return {"score": 100 * sum(right) / max(1, len(right)), **rollout_figures(rollouts)}, answers


def new_model(config: Config, inputs: Inputs) -> VisMemModel:
    """VisMem, untrained, on the base of the inputs."""
    backbone = load_base(inputs["base"], config.base.dtype)
    return VisMemModel(backbone, config.memory, config.invocation, config.seed)


def trainable(model: VisMemModel, prefixes: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Freeze everything but the parameters whose names start with one of `prefixes`; return those."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def steps_of(steps: int, epochs: int, batch_size: int, samples: int) -> int:
    """Steps of a training: `steps`, or where that is 0, `epochs` passes over the samples."""
    return steps or epochs * max(1, samples // batch_size)


def loop_settings(name: str, config: Config, stage: GrpoStageConfig, samples: int) -> LoopSettings:
    """The training loop's settings of a training by GRPO."""
    grpo = config.grpo
    return LoopSettings(
        name,
        steps_of(stage.steps, grpo.epochs, grpo.batch_size, samples),
        stage.learning_rate,
        stage.warmup_ratio,
        weight_decay=grpo.weight_decay,
        max_grad_norm=grpo.max_grad_norm,
        updates=grpo.updates,
        target_kl=stage.target_kl,
        checkpoint_every=grpo.checkpoint_every,
    )


def count(trained: Parameters) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in trained.values())


def cost(trained: Parameters, samples: int, phases: Sequence[Phase]) -> Metrics:
    """What training took: parameters, questions and sampled rollouts seen, wall seconds; resumed runs included."""
    questions = [len(phase.history) * min(phase.batch_size, samples) for phase in phases]
    return {
        "trainable_parameters": count(trained),
        "train_samples": sum(questions),
        "train_rollouts": sum(seen * phase.group_size for seen, phase in zip(questions, phases, strict=True)),
        "train_seconds": round(sum(row[SECONDS] for phase in phases for row in phase.history), 1),
    }
