"""Supervised start of stage I, an option of ours: reference answers are scored through one memory each."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from vismem.config import Stage1Config
from vismem.data.collate import target_text
from vismem.data.sample import Sample
from vismem.generation.invocation import draws, row_key
from vismem.generation.replay import read_prompts, score
from vismem.generation.types import LATENT, Invocation, MemoryKind, Rollout
from vismem.models.vismem import VisMemModel
from vismem.training.grpo import rollout_means
from vismem.training.loop import Metrics, batch_at


class WarmStart:
    """See loop.Objective: cross-entropy of the reference answers, one memory inserted as stage I will insert them."""

    def __init__(
        self, model: VisMemModel, samples: Sequence[Sample], config: Stage1Config, seed: int, accelerator: Accelerator
    ) -> None:
        self.model, self.samples, self.config, self.seed = model, samples, config, seed
        self.accelerator = accelerator

    def collect(self, step: int) -> tuple[tuple[Sample, ...], list[Rollout]]:
        """Reference answers with memories."""
        chosen = batch_at(step, len(self.samples), self.config.warm_start.batch_size, self.seed)
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        batch = tuple(self.samples[i] for i in mine)
        torch.manual_seed(self.seed * 1_000_003 + step)  # dropout
        return batch, [reference_rollout(self.model, s, self.config, self.seed + step) for s in batch]

    def backward(self, batch: tuple[tuple[Sample, ...], list[Rollout]]) -> Metrics:
        """Add the gradient of the mean cross-entropy."""
        samples, rollouts = batch
        self.model.train()
        with torch.no_grad():
            context = read_prompts(self.model, samples)
        sample = torch.arange(len(samples), device=self.accelerator.device)
        scores = score(self.model, context, rollouts, sample)
        loss = -rollout_means(scores.text_logprobs, scores.text_mask).mean()
        self.accelerator.backward(loss / self.accelerator.num_processes)
        self.model.eval()
        return {"loss": float(loss.detach())}


def reference_rollout(model: VisMemModel, sample: Sample, config: Stage1Config, seed: int) -> Rollout:
    """The reference answer of one sample as a rollout with one memory: at its start, or after a random delimiter."""
    tokenizer = model.backbone.processor.tokenizer
    text = target_text(sample)
    words = [*tokenizer(text, add_special_tokens=False)["input_ids"], model.stop_ids[0]]
    breaks = [i + 1 for i, before in enumerate(words[:-1]) if before in set(model.delimiter_ids)]
    early, place, kind = draws(seed, row_key(sample.id, 0), "warm start", 3)
    at = 0 if early < config.warm_start.at_start or not breaks else breaks[int(place * len(breaks))]
    chosen = MemoryKind.SHORT if kind < 0.5 else MemoryKind.LONG
    tokens: list[int] = []
    loss: list[bool] = []
    for index, word in enumerate(words):
        if index == at:
            invocation = Invocation(len(tokens), chosen, forced=True)
            inserted = [model.invoke_ids[chosen], *[LATENT] * model.length_of(chosen), model.end_ids[chosen]]
            tokens += inserted
            loss += [False] * len(inserted)
        tokens.append(word)
        loss.append(True)
    zeros = (0.0,) * len(tokens)
    return Rollout(sample.id, tuple(tokens), tuple(loss), zeros, (invocation,), text, text, True, len(words))
