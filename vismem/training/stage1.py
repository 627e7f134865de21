"""The step `stage1`: memory formation. The policy is frozen; query builder and both formers are trained (Sec. 3.4).

An option of ours, the supervised warm start before it, also trains a LoRA of the policy, which learns to read memories;
it stays on, and frozen, in what follows.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from vismem.config import Config, MemoryConfig, Stage1Config
from vismem.errors import UserError
from vismem.generation.context import Context
from vismem.generation.invocation import InvocationPolicy, Off, Random
from vismem.generation.replay import Scores, without_memory
from vismem.generation.types import Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.vismem import VisMemModel
from vismem.records import VANILLA
from vismem.training.loop import LoopSettings, check_shards
from vismem.training.rollout import GrpoObjective
from vismem.training.run import BEFORE, FORMATION, POLICY_LORA, Inputs, Run, new_model, refuse_wide, steps_of, trainable
from vismem.training.supervised import answer_with_memory


class Formation(GrpoObjective):
    """GRPO with memories at random places; the reference is the same answer without memories."""

    stage: Stage1Config

    def policy(self, step: int) -> InvocationPolicy:
        """At delimiters first, later also between them, where the model may call memory there."""
        steps = steps_of(self.stage.steps, self.grpo.epochs, self.grpo.batch_size, len(self.samples))
        anywhere = self.model.invocation_config.anywhere and step >= self.stage.anywhere_after * steps
        return Random(
            probability=self.stage.invoke_probability,
            anywhere=self.stage.anywhere_share if anywhere else 0.0,
        )

    def reference(
        self, policy: InvocationPolicy, context: Context, rollouts: Sequence[Rollout], sample: Tensor
    ) -> Scores:
        """The same words without any memory. The policy is frozen, so its prefill serves here too."""
        return self.scores(policy, context, [without_memory(rollout) for rollout in rollouts], sample)


def _first_model(config: Config, inputs: Inputs) -> VisMemModel:
    """The model that training starts from: a fresh one, or the earlier one of `stage1.start_from`."""
    model = new_model(config, inputs)
    if config.stage1.start_from is not None:
        model.load_weights(config.stage1.start_from)
    return model


def stage1(config: Config, inputs: Inputs, out: Path) -> str:
    """Train the formation of memories; writes the model's own weights, logs and metrics to `out`."""
    run, grpo, warm = Run("stage1", config, inputs, out, _first_model), config.grpo, config.stage1.warm_start
    pixels = config.memory.prompt_pixels
    if 0 < pixels <= MemoryConfig().prompt_pixels:  # not even the base could be compared with
        refuse_wide(run.model, "memory.prompt_pixels", pixels, "this base would see a handful of tokens of an image")
    batch_size, together = min(grpo.batch_size, len(run.samples)), run.model.backbone.processes
    check_shards(batch_size, run.accelerator, together)  # before the warm start, not after it
    if not (config.stage1.invoke_probability and run.model.limit(None)):
        raise UserError(
            "stage1's GRPO would form no memory: set stage1.invoke_probability and invocation.max_per_answer above 0"
        )
    reader = warm.policy_lora and warm.steps > 0
    run.model.policy_lora.enabled |= reader
    written = partial(answer_with_memory, probability=warm.invoke_probability)
    settings = LoopSettings(
        "warm_start",
        warm.steps,
        warm.learning_rate,
        warmup_ratio=0.05,
        matrix_learning_rate=warm.matrix_learning_rate,
        checkpoint_every=grpo.checkpoint_every,
    )
    trained = trainable(run.model, FORMATION + (POLICY_LORA if reader else ()))
    run.train_supervised(written, trained, settings, warm.batch_size, grpo.micro_batch)
    random = Random(probability=0.5)
    run.check(BEFORE, "random_50", random)
    run.train_grpo(Formation, config.stage1, trainable(run.model, FORMATION))
    arms: dict[str, InvocationPolicy] = {
        VANILLA: Off(base=True),
        "short": Random(probability=1.0, kinds=(MemoryKind.SHORT,), limit=1),  # at the answer's start
        "long": Random(probability=1.0, kinds=(MemoryKind.LONG,), limit=1),
        "random_50": random,
    }
    return run.finish(arms)
