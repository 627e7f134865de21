"""Supervised training: cross-entropy of reference answers, with memories in them or without.

With memories it is the warm start of stage I, an option of ours; without it is supervised fine-tuning, a baseline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from vismem.data.collate import target_text
from vismem.data.sample import Sample
from vismem.generation.invocation import row_key, row_uniforms
from vismem.generation.prompts import target_ids
from vismem.generation.replay import prefill, score, with_memories
from vismem.generation.types import Rollout
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel
from vismem.training.grpo import rollout_means
from vismem.training.loop import Metrics, all_reduce_mean, batch_at, shard_batch

Written = Callable[[VisMemModel, Sample, int], Rollout]  # a sample's reference answer, with a seed for its memories


@dataclass(eq=False)
class Supervised:
    """See loop.Objective: the mean cross-entropy of a batch of answers as `written` makes them.

    A micro-batch changes memory, not the result (except for dropout's random numbers).
    """

    model: VisMemModel
    samples: Sequence[Sample]
    written: Written
    seed: int
    accelerator: Accelerator
    batch_size: int
    micro_batch: int
    gradient_checkpointing: bool = False
    prompts_need_gradient: bool = False  # whether what is trained changes the prefill

    def collect(self, step: int) -> tuple[tuple[Sample, ...], list[Rollout]]:
        """Reference answers."""
        chosen = batch_at(step, len(self.samples), self.batch_size, self.seed)
        batch = tuple(self.samples[i] for i in shard_batch(chosen, self.accelerator, self.model.backbone.processes))
        torch.manual_seed(self.seed * 1_000_003 + step)  # dropout
        return batch, [self.written(self.model, sample, self.seed + step) for sample in batch]

    def backward(self, batch: tuple[tuple[Sample, ...], list[Rollout]]) -> Metrics:
        """Add the gradient of the mean cross-entropy, micro-batch by micro-batch."""
        mean, count = 0.0, len(batch[0])
        self.model.train()
        with self.model.checkpointed(self.gradient_checkpointing):
            for first in range(0, count, self.micro_batch):
                part = slice(first, first + self.micro_batch)
                samples, rollouts = batch[0][part], batch[1][part]
                with torch.set_grad_enabled(self.prompts_need_gradient):
                    context = prefill(self.model, samples)
                sample = torch.arange(len(samples), device=self.accelerator.device)
                scores = score(self.model, context, rollouts, sample)
                loss = -rollout_means(scores.logprobs, scores.mask).sum() / count
                self.accelerator.backward(loss / self.accelerator.num_processes)
                mean += float(loss.detach())
        self.model.eval()
        return all_reduce_mean({"loss": mean}, self.accelerator)


def plain_answer(model: VisMemModel, sample: Sample, seed: int = 0) -> Rollout:
    """The reference answer of one sample as a rollout without memory."""
    text = target_text(sample)
    words = (*target_ids(model.backbone.processor.tokenizer, sample), model.stop_ids[0])
    return Rollout(
        sample_id=sample.id,
        token_ids=words,
        loss_mask=(True,) * len(words),
        logprobs=(0.0,) * len(words),
        invocations=(),
        text=text,
        marked_text=text,
        finished=True,
        answer_length=len(words),
    )


def answer_with_memory(model: VisMemModel, sample: Sample, seed: int, probability: float) -> Rollout:
    """The same with memories at its start and after delimiters, each with chance `probability`, short or long.

    There is at least one, if there may be any, and there are at most `max_per_answer`: where none came up, or too many,
    the places are a uniform choice. All is drawn from the seed and the sample's id.
    """
    plain = plain_answer(model, sample)
    words, delimiters = plain.token_ids, set(model.delimiter_ids)
    places = [0, *(i + 1 for i, before in enumerate(words[:-1]) if before in delimiters)]
    coins, order, kinds = row_uniforms(seed, row_key(sample.id, 0), "warm start", 3 * len(places)).reshape(3, -1)
    shuffled = order.argsort()
    limit = model.invocation_config.max_per_answer
    drawn = [at for at in shuffled if coins[at] < probability][:limit] or shuffled[: min(1, limit)]
    return with_memories(model, plain, {places[at]: KINDS[int(2 * kinds[at])] for at in drawn})
