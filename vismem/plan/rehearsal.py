"""A step's own function run on shapes: what one GPU holds at the largest moment of each phase, and for how long.

What stands in for a step's `Run` loads no weights, reads no data and writes no files. Of a training step it runs the
first and the last token of the rollouts, one micro-batch of the backward pass, and the optimiser's step.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor

from vismem.config import Config
from vismem.errors import UserError
from vismem.evaluation.arms import resolve_arms
from vismem.generation.invocation import InvocationPolicy, Random
from vismem.generation.loop import DecodeLoop, Request
from vismem.generation.replay import answer_states, prefill
from vismem.generation.token_scores import together
from vismem.generation.torch_executor import TorchExecutor
from vismem.generation.types import Rollout
from vismem.models.backbones.base import Backbone
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel
from vismem.plan.machine import Machine
from vismem.plan.model import WORD, Questions, answers, hollow_base, questions
from vismem.plan.shapes import OTHER, Shapes, beside_dispatch
from vismem.steps import BY_NAME
from vismem.training.loop import LoopSettings
from vismem.training.optimizers import master_weights, optimizers, round_masters
from vismem.training.rollout import GrpoObjective, RolloutBatch
from vismem.training.run import FITTED, Inputs, Parameters, Run, count_of, new_model
from vismem.training.stage2 import Invocation, fit_batch
from vismem.training.supervised import Supervised

BASE, ADDED, GRADIENTS, STATES = "base weights", "VisMem's weights", "gradients", "optimiser states"
FIXED = (BASE, ADDED, GRADIENTS, STATES)
NOWHERE = Path("/nonexistent")
INPUTS: Inputs = dict.fromkeys(("base", "validate", "stage1"), NOWHERE)


@dataclass
class StepPlan:
    """A step as planned, on one GPU of those that share it."""

    name: str
    rows: int = 0  # answers decoded together
    trained: int = 0  # parameters; of several trainings in a step the last one's
    saved: int = 0  # parameters in the checkpoints of all of them
    phases: dict[str, dict[str, int]] = field(default_factory=dict)  # of each phase the bytes at its peak, by part
    seconds: float = 0.0  # of a training step; of a batch in `evaluate`
    steps: list[int] = field(default_factory=list)  # of each training
    total: float = 0.0  # seconds of all of them

    @property
    def largest(self) -> str:
        """The phase that holds most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def bytes(self) -> int:
        """At its peak."""
        return sum(self.phases[self.largest].values())

    @property
    def fixed(self) -> int:
        """What no batch makes smaller, of the bytes at its peak."""
        return sum(size for part, size in self.phases[self.largest].items() if part in FIXED)


class Rehearsal(Run):
    """Stands in for the `Run` of a training step; rehearses `evaluate` too."""

    def __init__(self, name: str, config: Config, machine: Machine, asked: Questions) -> None:
        self.name, self.config, self.asked = name, config, asked
        self.machine = machine.beside(config.base.dtype)
        self.accelerator, self.out, self.rollouts = Accelerator(cpu=True), NOWHERE, 0
        self.samples = questions(asked.train, asked)
        self.fitted = questions(fit_batch(config.grpo), asked)  # a batch of them
        self.shapes, self.plan = Shapes(self.machine.seconds), StepPlan(name)

    def rehearse(self) -> StepPlan:
        """The step as planned."""
        step = BY_NAME[self.name]
        with (
            beside_dispatch(),
            self.shapes,
            patch(f"{step.target.partition(':')[0]}.Run", self._started, create=True),  # evaluate has none
            patch("vismem.training.run.load_base", self._base),
            patch("vismem.training.stage2.decisions", self._decisions),
            patch("vismem.training.stage2.fit_invocation", lambda *_: None),
            patch.object(VisMemModel, "from_pretrained", lambda *_: new_model(self.config, INPUTS)),
            redirect_stderr(io.StringIO()),  # what a step says of its progress
        ):
            if self.name == "evaluate":
                self._evaluate()
            else:
                step.load()(self.config, INPUTS, NOWHERE)
        return self.plan

    def _base(self, *_: object) -> Backbone:
        with self.shapes.part(BASE):
            return hollow_base(self.config.base, self.machine.count)

    # --- what the steps call ---

    def _started(self, *given: Any) -> "Rehearsal":
        """In place of the class `Run`; what it is given last makes the model."""
        with self.shapes.part(ADDED):
            self.model = given[-1](self.config, INPUTS)
        return self

    def _train(
        self, objective: GrpoObjective | Supervised, trained: Parameters, settings: LoopSettings, batch_size: int
    ) -> int:
        if not settings.steps:
            return 0
        shares = 1 if self.config.base.tensor_parallel else self.machine.count
        if batch_size % shares:
            raise UserError(f"{settings.name}: a batch_size of {batch_size} must be a multiple of the {shares} GPUs")
        plan = self.plan
        plan.trained, share, sampled = count_of(trained), batch_size // shares, 0.0
        plan.saved += plan.trained
        with self._optimised(trained, settings.matrix_learning_rate):
            update = self.shapes.seconds
            if isinstance(objective, Supervised):
                objective.samples = questions(min(objective.micro_batch, share), self.asked)
                batch: Any = objective.collect(0)
                times = share / len(objective.samples)
            else:
                plan.rows = share * objective.stage.group_size
                batch, sampled = self._rollouts(objective, share)
                times = plan.rows / len(batch.rollouts)
                if isinstance(objective, Invocation) and objective.stage.penalty > 0:
                    sampled *= 2  # all answers again, with the kinds of memory reversed
            with self._phase("backward" if settings.name == self.name else settings.name):
                objective.backward(batch)
        plan.seconds = sampled + settings.updates * (update + self.shapes.seconds * times)
        plan.steps.append(settings.steps)
        plan.total += settings.steps * plan.seconds
        return 0

    def answer(self, *_: Any, **__: Any) -> list[Rollout]:
        """`_decisions` makes up what these answers are for."""
        return []

    def check(self, when: str, name: str, policy: InvocationPolicy, temperature: float = 0.0) -> list[Rollout]:
        """`finish` checks the same policies."""
        return []

    def finish(self, arms: Mapping[str, InvocationPolicy], save: Callable[[Path], None] | None = None) -> str:
        """Answers to validation questions."""
        self._answers("check", arms.values(), self.config.grpo.max_new_tokens, self.config.grpo.decode_batch)
        return ""

    def _evaluate(self) -> None:
        settings = self.config.evaluate
        arms, self.plan.rows = resolve_arms(settings.arms), settings.batch_size
        with self.shapes.part(ADDED):
            models = [
                VisMemModel(self._base(), self.config.memory, self.config.invocation) for _ in {a.model for a in arms}
            ]
        self.model = models[-1]  # all are loaded at once
        policies = [arm.policy for arm in arms]
        self.plan.seconds = self._answers("answers", policies, settings.max_new_tokens, settings.batch_size)

    def _decisions(self, model: VisMemModel, *_: object) -> tuple[Tensor, Tensor]:
        """The states of batches of answers, then of all, a part of them in double precision as in `fit_invocation`."""
        with self._phase("fit head"), torch.no_grad():
            rollouts = answers(model, self.fitted, 1, self.config.grpo.max_new_tokens, model.limit(None))
            length = max(len(rollout.token_ids) for rollout in rollouts)
            count = len(self.fitted)
            earlier = model.backbone.embedding.weight.new_zeros(FITTED - count, length, model.backbone.width)
            states = answer_states(model, prefill(model, self.fitted), rollouts, torch.arange(count))
            states = torch.cat([earlier, states]).flatten(0, 1)
            del earlier
            states[: together(states.shape[-1])].double()
        return states, torch.zeros(len(states), dtype=torch.int64)

    # --- their phases ---

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.shapes.restart()
        yield
        parts = {part: size for part, size in self.shapes.at_peak.items() if size}
        self.plan.phases[name] = max(self.plan.phases.get(name, {}), parts, key=lambda each: sum(each.values()))

    @contextmanager
    def _optimised(self, trained: Parameters, matrix_rate: float) -> Iterator[None]:
        """Within the block there are the gradients and optimiser states of `trained`, as behind a first step."""
        with self.shapes.part(STATES), master_weights(trained) as masters:
            with self.shapes.part(GRADIENTS):
                for weight in masters.values():
                    weight.grad = torch.zeros_like(weight)
            used = optimizers(masters, 1e-3, matrix_rate, 0.0)
            with self._phase("update"):
                for optimizer in used:
                    optimizer.step()
                round_masters(masters, trained)
            with self.shapes.part(OTHER):
                yield
        for weight in (*masters.values(), *trained.values()):
            weight.grad = None

    def _rollouts(self, objective: GrpoObjective, prompts: int) -> tuple[RolloutBatch, float]:
        """The phase in which a step's answers are sampled; one micro-batch of them, and seconds."""
        grpo, stage, policy = objective.grpo, objective.stage, objective.policy(0)
        seconds = self._decode("rollouts", policy, grpo.max_new_tokens, prompts, stage.group_size)
        together = min(grpo.micro_batch, prompts * stage.group_size)  # as `GrpoObjective.backward` divides them
        samples = questions(min(prompts, max(1, together // stage.group_size)), self.asked)
        objective.stage = stage.model_copy(update={"group_size": min(together, stage.group_size)})
        limit, group = self.model.limit(policy.limit), objective.stage.group_size
        rollouts = answers(self.model, samples, group, grpo.max_new_tokens, limit)
        return RolloutBatch(samples, rollouts, torch.ones(len(rollouts)), policy, {}), seconds

    def _answers(self, name: str, policies: Iterable[InvocationPolicy], tokens: int, rows: int) -> float:
        """Decode with each sort of policy; the most seconds."""
        sorts = {(type(policy), getattr(policy, "kinds", KINDS)): policy for policy in policies}
        return max(self._decode(name, policy, tokens, rows) for policy in sorts.values())

    @torch.inference_mode()
    def _decode(self, name: str, policy: InvocationPolicy, tokens: int, prompts: int, group: int = 1) -> float:
        """Decode `group` answers to each of `prompts` questions; returns seconds.

        Run are the prefill, memories at the answers' start, where many rows invoke at once, and the last token.
        """
        with self._phase(name):
            shapes, executor, formed = self.shapes, TorchExecutor(self.model), 0.0
            loop = DecodeLoop(executor)
            rows = loop.join(Request(questions(prompts, self.asked), policy, tokens, temperature=1.0, group_size=group))
            count, limit, kinds, share = len(rows), rows[0].limit, KINDS, 1.0
            if isinstance(policy, Random):
                kinds, share = policy.kinds, policy.probability / len(policy.kinds)
            if limit:
                asking = range(max(1, round(share * count)))
                executor.append([WORD] * count)
                for kind in kinds:
                    executor.form(kind, asking)  # the first reads the prompts too
                inserted = sorted(kinds, key=self.model.length_of)[-limit:]  # there may be room for one alone
                before = shapes.seconds
                for kind in inserted:
                    executor.insert(kind, asking, executor.form(kind, asking))
                formed = (shapes.seconds - before) / len(inserted) * limit * count / len(asking)
            state, before = executor.state, shapes.seconds
            state.slots.take(max(0, state.cache.capacity - int(state.slots.used.max()) - 1))
            loop.step()
            executor.append([WORD] * count)
        return before + tokens * (shapes.seconds - before) + formed
