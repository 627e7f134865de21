"""Rollouts and their gradient: what stage I, stage II and the baselines have in common (paper Sec. 3.4)."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from vismem.config import GrpoConfig, GrpoStageConfig
from vismem.data.sample import Sample
from vismem.generation.context import Context
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy
from vismem.generation.replay import Scores, padded, prefill, score
from vismem.generation.types import Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.policy import PolicyWeights
from vismem.models.vismem import VisMemModel
from vismem.training.grpo import group_advantages, kl_term, policy_term, rollout_means
from vismem.training.loop import Metrics, all_reduce_mean, all_reduce_sum, batch_at, shard_batch
from vismem.training.rewards import rewards_of


@dataclass(frozen=True)
class RolloutBatch:
    """One process's shard of a step's batch: prompts, their groups of rollouts, and the advantages."""

    samples: tuple[Sample, ...]
    rollouts: tuple[Rollout, ...]  # grouped by sample
    advantages: Tensor  # (R,)
    policy: InvocationPolicy
    metrics: Metrics


@dataclass(eq=False)
class GrpoObjective:
    """See loop.Objective. Subclasses say how answers are decoded and which penalties reduce their score.

    With `out`, one group of answers goes to `out/samples/STEP.jsonl` every `grpo.sample_every` steps.
    """

    model: VisMemModel
    samples: Sequence[Sample]
    grpo: GrpoConfig
    stage: GrpoStageConfig
    seed: int
    accelerator: Accelerator
    out: Path | None = None
    prompts_need_gradient: bool = False  # whether what is trained changes the prefill

    def __post_init__(self) -> None:
        """The reference policy's weights are those from which training starts."""
        self.start = PolicyWeights(self.model.tokens, self.model.policy_lora)

    # --- what a stage decides ---

    def policy(self, step: int) -> InvocationPolicy:
        """Who decides about memories in this step's rollouts."""
        raise NotImplementedError

    def shaped(self, rewards: Tensor, batch: Sequence[Sample], rollouts: Sequence[Rollout], step: int) -> Tensor:
        """The rewards (B, G) less the stage's penalties."""
        return rewards

    def reference(
        self, policy: InvocationPolicy, context: Context, rollouts: Sequence[Rollout], sample: Tensor
    ) -> Scores:
        """The rollouts under the reference policy; its sampled tokens are theirs, in the same order.

        By default it is the policy as training found it: the new tokens' rows and the adapter of then, memories formed
        at the recorded places. `context` is the prompts' prefill under the policy being trained.
        """
        with self.model.reference(self.start):
            if self.prompts_need_gradient:  # the prefill is the adapter's, what memories read of the prompts is not
                seen = None if self.model.policy_lora.settings.vision else context.prompt  # image features are its too
                own = prefill(self.model, context.samples, seen)
                context = replace(own, patches=context.patches, prefix=context.prefix)
            return self.scores(policy, context, rollouts, sample)

    def scores(self, policy: InvocationPolicy, context: Context, rollouts: Sequence[Rollout], sample: Tensor) -> Scores:
        """The rollouts under the model as it is; `policy` sampled them, `sample` (R,) are their prompts."""
        return score(self.model, context, rollouts, sample, policy, self.grpo.temperature)

    # --- loop.Objective ---

    def collect(self, step: int) -> RolloutBatch:
        """Sample a group of answers for each prompt of the step, and score them."""
        chosen = batch_at(step, len(self.samples), self.grpo.batch_size, self.seed)
        batch = tuple(self.samples[i] for i in shard_batch(chosen, self.accelerator, self.model.backbone.processes))
        policy = self.policy(step)
        rollouts = self.sample(batch, policy, step)
        rewards = rewards_of(batch, rollouts)
        shaped = self.shaped(rewards, batch, rollouts, step)
        advantages = group_advantages(shaped, self.grpo.normalise_by_std)
        metrics = {"reward": float(rewards.mean()), **rollout_figures(rollouts)}
        metrics["penalty"] = float((rewards - shaped).mean())
        metrics["zero_variance_groups"] = float((advantages == 0).all(dim=1).float().mean())
        if self.out and step % self.grpo.sample_every == 0 and self.accelerator.is_main_process:
            group, folder = self.stage.group_size, self.out / "samples"
            folder.mkdir(exist_ok=True)
            lines = answer_lines(batch[:1] * group, rollouts[:group], "reward", rewards[0].tolist())
            (folder / f"{step:06d}.jsonl").write_text(lines)
        figures = all_reduce_mean(metrics, self.accelerator)
        return RolloutBatch(batch, tuple(rollouts), advantages.flatten(), policy, figures)

    def sample(self, batch: Sequence[Sample], policy: InvocationPolicy, step: int) -> list[Rollout]:
        """A group of answers for each prompt; the same policy samples the same ones again in the same step."""
        return generate(
            self.model,
            batch,
            policy,
            max_new_tokens=self.grpo.max_new_tokens,
            temperature=self.grpo.temperature,
            seed=self.seed * 1_000_003 + step,
            group_size=self.stage.group_size,
        )

    def backward(self, batch: RolloutBatch) -> Metrics:
        """Add the gradient of the clipped objective and the KL term, micro-batch by micro-batch."""
        group = self.stage.group_size
        prompts = max(1, self.grpo.micro_batch // group)
        rows = min(self.grpo.micro_batch, prompts * group)
        sums: Metrics = defaultdict(float)
        with self.model.checkpointed(self.grpo.gradient_checkpointing):
            for first in range(0, len(batch.samples), prompts):
                samples = batch.samples[first : first + prompts]
                context: Context | None = None
                end = (first + len(samples)) * group
                for start in range(first * group, end, rows):
                    if context is None or self.prompts_need_gradient:
                        with torch.set_grad_enabled(self.prompts_need_gradient):
                            context = prefill(self.model, samples)
                    context = replace(context, patches=None, prefix=None)  # computed with gradient for each micro-batch
                    added = self._micro_batch(batch, context, first, slice(start, min(start + rows, end)))
                    for name, value in added.items():
                        sums[name] += value
        sums = all_reduce_sum(sums, self.accelerator)
        tokens = sums.pop("tokens")
        loss = sums.pop("loss") / len(batch.rollouts) / self.accelerator.num_processes
        return {**batch.metrics, "loss": loss, **{name: value / max(1, tokens) for name, value in sums.items()}}

    def _micro_batch(self, batch: RolloutBatch, context: Context, first: int, rows: slice) -> Metrics:
        """Add the gradient of some rollouts, and return sums to log. `context`: the prompts from number `first`."""
        device = self.accelerator.device
        rollouts, advantages = batch.rollouts[rows], batch.advantages[rows].to(device)
        sample = torch.arange(rows.start, rows.stop, device=device) // self.stage.group_size - first
        scores = self.scores(batch.policy, context, rollouts, sample)
        old = padded([r.logprobs for r in rollouts], scores.logprobs.dtype).to(device)
        clip, length = (self.grpo.clip_low, self.grpo.clip_high), self.grpo.loss_length
        term = policy_term(scores.logprobs, old, advantages, scores.mask, *clip, length)
        loss, logged = term.loss, {}
        if self.stage.kl_coefficient > 0:
            with torch.no_grad():
                found = self.reference(batch.policy, context, rollouts, sample)
            reference = torch.zeros_like(scores.logprobs).masked_scatter(scores.mask, found.logprobs[found.mask])
            kl = kl_term(scores.logprobs, reference)
            loss = loss + self.stage.kl_coefficient * rollout_means(kl, scores.mask, length).sum()
            logged["kl"] = float((kl.detach() * scores.mask).sum())
        if loss.requires_grad:  # not where no row of the micro-batch invoked
            self.accelerator.backward(loss / len(batch.rollouts) / self.accelerator.num_processes)
        return {
            "loss": float(loss.detach()),
            "tokens": float(term.tokens),
            **logged,
            "update_kl": float((kl_term(old, scores.logprobs.detach()) * scores.mask).sum()),
            "clip_fraction": float(term.clipped),
            "entropy": float((scores.entropy * scores.mask).sum()),
        }


def answer_lines(
    samples: Sequence[Sample], rollouts: Sequence[Rollout], figure: str, values: Sequence[float], **first: str
) -> str:
    """One JSON line per answer: `first`, its question, reference and text, and its value under the name `figure`."""
    lines = [
        {**first, "question": sample.question, "reference": sample.answer, "answer": rollout.marked_text, figure: value}
        for sample, rollout, value in zip(samples, rollouts, values, strict=True)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def rollout_figures(rollouts: Sequence[Rollout]) -> Metrics:
    """Invocations per answer by kind, answer length in tokens, and the share of answers that ended before the limit."""
    count = len(rollouts)
    kinds = [i.kind for r in rollouts for i in r.invocations]
    return {
        **{f"invocations_{kind.value}": kinds.count(kind) / count for kind in MemoryKind},
        "answer_length": sum(r.answer_length for r in rollouts) / count,
        "finished": sum(r.finished for r in rollouts) / count,
    }
