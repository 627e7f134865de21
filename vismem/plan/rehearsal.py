"""A step's phases run on shapes: what one GPU holds at the largest moment of each, and how long it computes."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn

from vismem.config import Config, GrpoStageConfig
from vismem.generation.invocation import InvocationPolicy, Random
from vismem.generation.loop import DecodeLoop, Request
from vismem.generation.slots import room
from vismem.generation.torch_executor import TorchExecutor
from vismem.models.backbones.base import Backbone
from vismem.models.kinds import MemoryKind
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel
from vismem.plan.machine import Machine
from vismem.plan.model import WORD, answers, hollow_base, questions
from vismem.plan.shapes import Shapes
from vismem.training.optimizers import master_weights, optimizers, round_masters
from vismem.training.rollout import GrpoObjective, RolloutBatch
from vismem.training.run import FORMATION, INVOCATION, PREFIX, count_of
from vismem.training.supervised import Supervised, plain_answer

LABELS = {  # what a tensor counts as, by the function that allocates it
    "RowCache.reserve": "KV cache",
    "RowCache.update": "KV cache",
    "DynamicLayer.update": "KV cache",
    "DynamicLayer.lazy_initialization": "KV cache",
    "_LayerCache.update": "KV cache",
    "VisMemModel.logits": "logits",
    "TorchExecutor.choose": "logits",
    "token_scores": "logits",
    "VisMemModel.short_stream": "short memories' stream",
    "ShortFormer.forward": "forming short memories",
    "LongFormer.prefill": "long memories' cache",
    "LongFormer.forward": "forming long memories",
    "QueryBuilder.forward": "query builder",
    "encode": "reading images",
    "Context.read": "reading prompts",
    "DecodeState.join": "rows' embeddings and states",
    "DecodeState.append": "decoding a token",
    "_Pass.hidden": "answers read back",
    "_engine_run_backward": "backward pass",
}
BASE, ADDED = "base weights", "VisMem's weights"
MASTERS, GRADIENTS, STATES = "float32 masters", "gradients", "optimiser states"
REFERENCE = 256  # tokens of a reference answer, assumed


@dataclass(frozen=True)
class Phase:
    """One phase of a step: bytes by part at its peak, and the seconds and FLOP of what was run of it."""

    name: str
    parts: dict[str, int]
    seconds: float
    flops: int

    @property
    def bytes(self) -> int:
        """At the peak."""
        return sum(self.parts.values())


@dataclass
class StepPlan:
    """A step as planned, on one GPU of those that share it."""

    name: str
    rows: int = 0  # answers decoded together
    trained: int = 0  # parameters
    phases: list[Phase] = field(default_factory=list)
    seconds: float = 0.0  # of a training step; of a batch in `evaluate`

    @property
    def largest(self) -> Phase:
        """The phase that holds most."""
        return max(self.phases, key=lambda phase: phase.bytes)


class Rehearsal:
    """Runs one step's phases on shapes."""

    def __init__(
        self, name: str, config: Config, machine: Machine, image: tuple[int, int], only: str | None = None
    ) -> None:
        """`only`: the one phase that is wanted; the others are left out, but for `update`."""
        self.config, self.machine, self.image, self.only = config, machine, image, only
        self.shapes, self.plan = Shapes(LABELS, machine.seconds), StepPlan(name)

    def base(self) -> Backbone:
        """The base."""
        return hollow_base(self.config.base)

    def wanted(self, name: str) -> bool:
        """Whether to run the phase of this name."""
        return self.only in (None, name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs within the block is a phase of the plan."""
        self.shapes.restart()
        yield
        parts = {part: size for part, size in self.shapes.at_peak.items() if size}
        self.plan.phases.append(Phase(name, parts, self.shapes.seconds, self.shapes.flops))

    def model(self, kind: type[VisMemModel] = VisMemModel) -> VisMemModel:
        """The model of a fresh training."""
        with self.shapes.part(BASE):
            backbone = self.base()
        with self.shapes.part(ADDED):
            return kind(backbone, self.config.memory, self.config.invocation, self.config.seed)

    @torch.inference_mode()
    def decode(
        self, name: str, model: VisMemModel, policy: InvocationPolicy, tokens: int, prompts: int, group: int = 1
    ) -> float:
        """The phase in which `group` answers to each of `prompts` questions are decoded; returns its seconds.

        At their start as many rows form a memory of a kind at once as the policy has it, at their end a tenth of them.
        """
        if not self.wanted(name):
            return 0.0
        shapes, samples = self.shapes, questions(prompts, self.image)
        with self.phase(name):
            executor = TorchExecutor(model)
            loop = DecodeLoop(executor)
            rows = loop.join(Request(samples, policy, tokens, temperature=1.0, group_size=group))
            joined, count, limit = shapes.seconds, len(rows), rows[0].limit
            share = policy.probability / len(policy.kinds) if isinstance(policy, Random) else 1.0
            early, late = (range(max(1, round(part * share * count))) for part in (1.0, 0.1))
            kinds = KINDS if limit else ()
            if limit:
                executor.append([WORD] * count)
                memories = {kind: executor.form(kind, early) for kind in kinds}
                before = shapes.seconds
                executor.insert(MemoryKind.LONG, early, memories.pop(MemoryKind.LONG))
                inserted = (shapes.seconds - before) * count / len(early)
            else:
                inserted = 0.0
            longest = max(map(model.length_of, KINDS))
            ahead = room(tokens, limit, longest) - 2 - bool(limit) * (longest + 2)
            executor.state.slots.take(ahead // 2)
            before = shapes.seconds
            loop.step()
            executor.append([WORD] * count)
            token = shapes.seconds - before
            executor.state.slots.take(ahead - ahead // 2)
            executor.append([WORD] * count)
            before = shapes.seconds
            for kind in kinds:
                executor.form(kind, late)
            formed = (shapes.seconds - before) * count / len(late) / 2
        return joined + tokens * token + limit * (formed + inserted)

    @contextmanager
    def optimised(self, trained: Mapping[str, nn.Parameter], matrix_rate: float) -> Iterator[None]:
        """Within the block there are the gradients and optimiser states of `trained`, as behind a first step."""
        self.plan.trained, shapes = count_of(trained), self.shapes
        with ExitStack() as stack:
            with shapes.part(MASTERS):
                masters = stack.enter_context(master_weights(trained))
            with shapes.part(GRADIENTS):
                for weight in masters.values():
                    weight.grad = torch.zeros_like(weight)
            used = optimizers(masters, 1e-3, matrix_rate, 0.0)
            with shapes.part(STATES), self.phase("update"):
                for optimizer in used:
                    optimizer.step()
                round_masters(masters, trained)
            yield
        for weight in (*masters.values(), *trained.values()):
            weight.grad = None

    def grpo(
        self, model: VisMemModel, kind: type[GrpoObjective], stage: GrpoStageConfig, trained: Mapping[str, nn.Parameter]
    ) -> None:
        """Rollouts and their backward pass."""
        grpo, plan = self.config.grpo, self.plan
        prompts = max(1, grpo.batch_size // self.machine.count)
        plan.rows = prompts * stage.group_size
        together = min(grpo.micro_batch, plan.rows)  # as `GrpoObjective.backward` divides them
        samples = questions(min(prompts, max(1, together // stage.group_size)), self.image)
        stage = stage.model_copy(update={"group_size": min(together, stage.group_size)})
        objective = kind(model, samples, grpo, stage, 0, Accelerator(cpu=True))
        objective.prompts_need_gradient = _prompts_need_gradient(trained)
        policy = objective.policy(0)
        rollouts = answers(model, samples, stage.group_size, grpo.max_new_tokens, model.limit(policy.limit))
        with self.optimised(trained, 0.0):
            update = self.shapes.seconds
            plan.seconds = self.decode("rollouts", model, policy, grpo.max_new_tokens, prompts, plan.rows // prompts)
            if self.wanted("backward"):
                with self.phase("backward"):
                    objective.backward(RolloutBatch(samples, rollouts, torch.ones(len(rollouts)), policy, {}))
                update += self.shapes.seconds * plan.rows / len(rollouts)
        plan.seconds += grpo.updates * update

    def supervised(
        self,
        name: str,
        model: VisMemModel,
        trained: Mapping[str, nn.Parameter],
        sizes: tuple[int, int],
        memories: int = 0,
        matrix_rate: float = 0.0,
    ) -> None:
        """The backward pass of reference answers, with so many memories; `sizes`: questions of a batch, together."""
        config, (batch, together) = self.config, sizes
        share = max(1, batch // self.machine.count)
        samples = questions(min(together, share), self.image)
        objective = Supervised(
            model, samples, plain_answer, 0, Accelerator(cpu=True), batch, together, config.grpo.gradient_checkpointing
        )
        objective.prompts_need_gradient = _prompts_need_gradient(trained)
        rollouts = answers(model, samples, 1, min(REFERENCE, config.grpo.max_new_tokens), memories)
        if not self.wanted(name):
            return
        with self.optimised(trained, matrix_rate):
            update = self.shapes.seconds
            with self.phase(name):
                objective.backward((samples, list(rollouts)))
        self.plan.seconds = update + self.shapes.seconds * share / len(samples)


def _prompts_need_gradient(trained: Mapping[str, nn.Parameter]) -> bool:
    return any(not name.startswith(FORMATION + INVOCATION + PREFIX) for name in trained)
