"""One step of training from its inputs to its metrics: what stage I, stage II and the baselines share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from vismem.config import Config, GrpoStageConfig
from vismem.config.training import SMALL_WIDTH
from vismem.data.sample import Sample, StoredSamples
from vismem.errors import UserError
from vismem.evaluation.answers import score
from vismem.files import write_json, write_text
from vismem.generation.batches import FittingBatches
from vismem.generation.invocation import InvocationPolicy
from vismem.generation.types import Rollout
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel
from vismem.progress import progress
from vismem.ranks import share_of_work
from vismem.training.loop import LoopSettings, Metrics, train
from vismem.training.rollout import GrpoObjective, answer_lines, rollout_figures
from vismem.training.supervised import Supervised, Written

FORMATION = ("builder.", "short.", "long.")  # prefixes of the parameters that stage I trains
INVOCATION = ("tokens.",)  # and stage II
PREFIX = ("prefix",)  # and the baseline static_prefix
POLICY_LORA = ("policy_lora.",)  # and with `policy_lora` the warm start and stage II, and the LoRA baselines
FITTED = 256  # train questions whose answers stage II's rows of the head are fitted on
CHECKED = 256  # validation questions answered for metrics.json
LOGGED = 20  # of them in samples.jsonl, per arm
CHECKS = "checks.json"  # the score of each, before GRPO and after all training
BEFORE, AFTER = "before", "after"

Inputs = Mapping[str, Path]
Parameters = Mapping[str, nn.Parameter]


class Run:
    """Device, data and model of a step, and what its training took so far. `model` loads the model from the inputs.

    UserError for a train or validation split without rows.
    """

    def __init__(
        self, name: str, config: Config, inputs: Inputs, out: Path, model: Callable[[Config, Inputs], VisMemModel]
    ) -> None:
        self.name, self.config, self.out = name, config, out
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        torch.manual_seed(config.seed)
        data = inputs["validate"] / "data"
        samples, validation = StoredSamples(data / "train"), StoredSamples(data / "validation")
        for split, rows in (("train", samples), ("validation", validation)):
            if not rows:
                raise UserError(
                    f"{data / split} has no rows: name sources with a {split} split in params.yaml, section prepare"
                )
        self.samples: Sequence[Sample] = samples
        self.fitted: Sequence[Sample] = samples.share(FITTED)
        self.checked: Sequence[Sample] = validation.share(CHECKED)
        self.model = model(config, inputs)
        self.model.backbone.model.to(self.accelerator.device)
        self.model.to(self.accelerator.device)
        self.trained: dict[str, nn.Parameter] = {}
        self.questions, self.rollouts, self.seconds = 0, 0, 0.0  # of all phases, resumed runs included
        self.checks: dict[str, dict[str, list[float]]] = {BEFORE: {}, AFTER: {}}

    def train_grpo(
        self, kind: type[GrpoObjective], stage: GrpoStageConfig, trained: Parameters, rates: Mapping[str, float] = {}
    ) -> None:
        """Run one phase of GRPO; `rates` as in `LoopSettings`."""
        grpo, seed = self.config.grpo, self.config.seed
        needed = changes_prefill(trained)
        objective = kind(self.model, self.samples, grpo, stage, seed, self.accelerator, self.out, needed)
        settings = replace(loop_settings(self.name, self.config, stage, len(self.samples)), rates=rates)
        seen = self._train(objective, trained, settings, grpo.batch_size)
        self.rollouts += seen * stage.group_size

    def train_supervised(
        self, written: Written, trained: Parameters, settings: LoopSettings, batch_size: int, micro_batch: int
    ) -> None:
        """Run one phase of supervised training on the answers that `written` makes."""
        seed, checkpointing = self.config.seed, self.config.grpo.gradient_checkpointing
        needed = changes_prefill(trained)
        objective = Supervised(
            self.model, self.samples, written, seed, self.accelerator, batch_size, micro_batch, checkpointing, needed
        )
        self._train(objective, trained, settings, batch_size)

    def _train(
        self, objective: GrpoObjective | Supervised, trained: Parameters, settings: LoopSettings, batch_size: int
    ) -> int:
        """Run one phase; returns how many questions it saw."""
        self.trained |= trained
        self.state = train(objective, trained, settings, self.out, self.accelerator)
        seen = self.state.steps * min(batch_size, len(self.samples))
        self.questions += seen
        self.seconds += self.state.seconds
        return seen

    def answer(
        self, samples: Sequence[Sample], policy: InvocationPolicy, about: str, batch_size: int, temperature: float = 0.0
    ) -> list[Rollout]:
        """Answer samples, `batch_size` at a time; processes share these batches, and all return all answers."""
        limit, seed, quiet = self.config.grpo.max_new_tokens, self.config.seed, not self.accelerator.is_main_process
        own, shares = share_of_work(self.accelerator, self.model.backbone.processes)
        answered, fitting = list[tuple[int, list[Rollout]]](), FittingBatches()
        settings = {"max_new_tokens": limit, "temperature": temperature, "seed": seed}
        with progress(f"{self.name}: {about}", len(samples), quiet=quiet) as advance:
            for at in range(0, len(samples), batch_size)[own::shares]:
                batch = samples[at : at + batch_size]
                answered.append((at, fitting.generate(self.model, batch, policy, **settings)[0]))
                advance(len(batch) * shares)
        batches = sorted(dict(gather_object(answered)).items())  # some may come from several processes
        return [rollout for _, found in batches for rollout in found]

    def check(self, when: str, name: str, policy: InvocationPolicy, temperature: float = 0.0) -> list[Rollout]:
        """Answer CHECKED validation questions; keep their scores as those of `name`, BEFORE or AFTER.

        The same numbers are drawn at both times, so that scores are paired question by question.
        """
        batch_size = self.config.grpo.decode_batch
        rollouts = self.answer(self.checked, policy, f"validation {name}", batch_size, temperature)
        paired = zip(self.checked, rollouts, strict=True)
        self.checks[when][name] = [score(sample, rollout.text) for sample, rollout in paired]
        return rollouts

    def finish(self, arms: Mapping[str, InvocationPolicy], save: Callable[[Path], None] | None = None) -> str:
        """Write the model; answer validation questions in each arm; write `metrics.json`, CHECKS and `samples.jsonl`.

        `save` writes the model, where `save_pretrained` would not. It comes first, so that it is there should answering
        fail. Returns steps and scores in one line.
        """
        if self.accelerator.is_main_process:
            (save or self.model.save_pretrained)(self.out)
        checked = self.checked
        metrics: dict[str, Metrics] = {}
        lines = ""
        for name, policy in arms.items():
            rollouts = self.check(AFTER, name, policy)
            right = self.checks[AFTER][name]
            metrics[name] = {"score": 100 * sum(right) / len(right), **rollout_figures(rollouts)}
            lines += answer_lines(checked[:LOGGED], rollouts[:LOGGED], "score", right[:LOGGED], arm=name)
        count = count_of(self.trained)
        if self.accelerator.is_main_process:
            write_text(self.out / "samples.jsonl", lines)
            write_json(self.out / CHECKS, self.checks)
            figures = {
                "validation": metrics,
                "n": len(checked),
                "last_step": self.state.last,
                "trainable_parameters": count,
                "train_samples": self.questions,
                "train_rollouts": self.rollouts,
                "train_seconds": round(self.seconds, 1),
            }
            write_json(self.out / "metrics.json", figures)
            for leftover in (*self.out.glob("*.checkpoint"), *self.out.glob(".*.new")):  # the latter of a kill
                leftover.unlink()
        kind = "GRPO" if self.rollouts else "supervised"
        scores = ", ".join(f"{name} {figures['score']:.1f} %" for name, figures in metrics.items())
        return f"{self.name}: {self.state.steps} {kind} steps of {count:,} parameters; validation {scores}"


def new_model(config: Config, inputs: Inputs, kind: type[VisMemModel] = VisMemModel) -> VisMemModel:
    """VisMem or a variant of it, untrained, on the base of the inputs."""
    backbone = load_base(inputs["base"], config.base.dtype, config.base.tensor_parallel)
    model = kind(backbone, config.memory, config.invocation, config.seed)
    model.new_tokens = config.grpo.max_new_tokens
    return model


def refuse_wide(model: VisMemModel, name: str, value: float, why: str) -> None:
    """UserError for a setting of the tiny VLM on a base that is not small."""
    if model.backbone.width >= SMALL_WIDTH:
        raise UserError(
            f"{name} {value} is for the tiny VLM: {why}. Let the profile extend one of a large model (docs/models.md), "
            "or set it to 0"
        )


def trainable(model: VisMemModel, prefixes: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Freeze everything but the parameters whose names start with one of `prefixes`; return those."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def changes_prefill(trained: Parameters) -> bool:
    """Whether the prompts' prefill depends on what is trained."""
    return any(not name.startswith(FORMATION + INVOCATION + PREFIX) for name in trained)


def count_of(parameters: Parameters) -> int:
    """How many numbers the parameters hold."""
    return sum(parameter.numel() for parameter in parameters.values())


def steps_of(steps: int, epochs: int, batch_size: int, samples: int, times: float = 1.0) -> int:
    """Steps of a training: `steps`, or where that is 0, `epochs` passes over the samples; `times` as many, never 0."""
    return max(1, round(times * (steps or epochs * max(1, samples // batch_size))))


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
