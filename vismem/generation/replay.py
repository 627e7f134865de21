"""Replay of recorded answers with gradient: the memories are formed again at the recorded places.

The answers are cut after every invoke token. Chunk by chunk all rows are passed through the language model on one
growing KV cache; between two chunks the next memories are formed from the hidden states computed so far, so the
gradient of a later token reaches the former that made an earlier latent (paper Sec. 3.4).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from vismem.data.sample import Sample
from vismem.generation.context import Context
from vismem.generation.prompts import encode
from vismem.generation.token_scores import token_scores
from vismem.generation.types import LATENT, Invocation, Rollout
from vismem.models.backbones.base import Prompt
from vismem.models.kinds import MemoryKind
from vismem.models.memory import causal_mask
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel

ROWS_TOGETHER = 32  # answers that go through the model at a time


@dataclass
class Scores:
    """Per-token results of R answers, right-padded to T tokens of `Rollout.token_ids`."""

    logprobs: Tensor  # (R, T) of the recorded tokens, under the temperature and the bars of the sampling
    text_logprobs: Tensor  # (R, T) the same without the invoke tokens in the vocabulary, for the KL term
    entropy: Tensor  # (R, T) nats
    mask: Tensor  # (R, T) bool: sampled tokens, the loss mask
    text_mask: Tensor  # (R, T) bool: sampled tokens other than invoke tokens
    latents: list[Tensor]  # the memories formed, (rows, N, d) each; of one answer in the order of its invocations


def prefill(model: VisMemModel, samples: Sequence[Sample], prompt: Prompt | None = None) -> Context:
    """Run the prompts through the vision encoder (unless `prompt` holds them encoded) and the language model once."""
    prompt = prompt or encode(model.backbone, samples)
    return Context.read(model, prompt, DynamicCache())


def without_memory(rollout: Rollout) -> Rollout:
    """The same answer with every invocation left out: what the reference policy of stage I reads."""
    keep: list[bool] = []
    inside = False
    starts = {invocation.position for invocation in rollout.invocations}
    for position, token in enumerate(rollout.token_ids):
        inside = inside or position in starts
        keep.append(not inside)
        closing = token != LATENT and position > 0 and rollout.token_ids[position - 1] == LATENT
        inside = inside and not closing

    return replace(
        rollout,
        token_ids=tuple(compress(rollout.token_ids, keep)),
        loss_mask=tuple(compress(rollout.loss_mask, keep)),
        logprobs=tuple(compress(rollout.logprobs, keep)),
        invocations=(),
        marked_text=rollout.text,
    )


def decisions_of(model: VisMemModel, rollout: Rollout) -> tuple[tuple[int, MemoryKind], ...]:
    """The invocations as (decision, kind), which `invocation.Replay` takes."""
    inserted, found = 0, []
    for invocation in rollout.invocations:
        found.append((invocation.position - inserted, invocation.kind))
        inserted += model.length_of(invocation.kind) + 1
    return tuple(found)


def score(
    model: VisMemModel,
    context: Context,
    rollouts: Sequence[Rollout],
    sample: Tensor,
    *,
    sampled_kinds: tuple[MemoryKind, ...] = (),
    limit: int | None = None,
    temperature: float = 1.0,
) -> Scores:
    """Score recorded answers; `sample` (R,) says which of the context's prompts each answer belongs to.

    `sampled_kinds` and `limit` are those of the policy that sampled: they decide which invoke tokens were barred.
    """
    limit = model.invocation_config.max_per_answer if limit is None else limit
    parts, order = [], sorted(range(len(rollouts)), key=lambda row: _cuts(rollouts[row]))
    for start in range(0, len(order), ROWS_TOGETHER):
        rows = order[start : start + ROWS_TOGETHER]
        part = _Pass(model, context, [rollouts[row] for row in rows], sample[rows])
        parts.append(part.scores(sampled_kinds, limit, temperature))
    longest = max(part.mask.shape[1] for part in parts)
    back = torch.tensor(order, device=sample.device).argsort()
    whole = {
        name: torch.cat([pad(getattr(part, name), (0, longest - part.mask.shape[1])) for part in parts])[back]
        for name in ("logprobs", "text_logprobs", "entropy", "mask", "text_mask")
    }
    return Scores(**whole, latents=[memory for part in parts for memory in part.latents])


def _cuts(rollout: Rollout) -> list[int]:
    """Where the answer is cut: rows cut at like places go through the model together, so that little is padded."""
    return [*(invocation.position for invocation in rollout.invocations), len(rollout.token_ids)]


def answer_states(model: VisMemModel, context: Context, rollouts: Sequence[Rollout], sample: Tensor) -> Tensor:
    """(R, T, d): the hidden state from which each token of the recorded answers was predicted."""
    return _Pass(model, context, rollouts, sample).hidden()


@dataclass
class _Chunk:
    """A piece of R answers, right-padded: after a memory it begins with its latents and end token."""

    start: list[int]  # first index in token_ids
    stop: list[int]
    opening: list[Invocation | None]  # the invocation whose latents begin it


class _Pass:
    def __init__(self, model: VisMemModel, context: Context, rollouts: Sequence[Rollout], sample: Tensor) -> None:
        self.model, self.context, self.rollouts, self.sample = model, context, rollouts, sample
        self.device = sample.device
        self.longest = max(len(rollout.token_ids) for rollout in rollouts)
        self.latents: list[Tensor] = []
        # what has been read so far, right-padded: the prompt, then chunk after chunk
        self.keys = context.prompt.mask[sample]
        self.embeds = context.prompt.embeds[sample]
        self.positions = context.prompt.positions[:, sample]
        self.seen = [context.last[sample][:, None]]  # hidden states
        self.place = torch.zeros(len(sample), self.longest + 1, dtype=torch.long, device=self.device)  # in `seen`

    def hidden(self) -> Tensor:
        """(R, T, d): the hidden state from which each token of the answer was predicted."""
        context, sample, backbone = self.context, self.sample, self.model.backbone
        cache = DynamicCache()
        for layer, held in enumerate(context.cache.layers):
            cache.update(held.keys[sample], held.values[sample], layer)
        following = context.prompt.next_position()[sample]
        for chunk in self._chunks():
            lengths = torch.tensor([b - a for a, b in zip(chunk.start, chunk.stop, strict=True)], device=self.device)
            width = int(lengths.max())
            piece = self._embed(chunk, width)
            offset = torch.arange(width, device=self.device)
            real = offset < lengths[:, None]
            at = (following[:, None] + offset).expand(3, -1, -1)
            self.keys = torch.cat([self.keys, real], dim=1)
            mask = causal_mask(self.keys, width)
            hidden = backbone.language(piece, at, mask, cache)
            before = sum(part.shape[1] for part in self.seen)
            start = torch.tensor(chunk.start, device=self.device)
            row, column = real.nonzero(as_tuple=True)
            self.place[row, start[row] + column + 1] = before + column
            self.seen.append(hidden)
            self.embeds = torch.cat([self.embeds, piece], dim=1)
            self.positions = torch.cat([self.positions, at], dim=2)
            following = following + lengths
        states = torch.cat(self.seen, dim=1)
        return states.gather(1, self.place[:, :-1, None].expand(-1, -1, states.shape[-1]))

    def _chunks(self) -> list[_Chunk]:
        chunks = []
        for index in range(1 + max(len(rollout.invocations) for rollout in self.rollouts)):
            start, stop, opening = [], [], []
            for rollout in self.rollouts:
                bounds = [0, *(i.position + 1 for i in rollout.invocations), len(rollout.token_ids)]
                end = len(bounds) - 1
                start.append(bounds[min(index, end)])
                stop.append(bounds[min(index + 1, end)])
                opening.append(rollout.invocations[index - 1] if 0 < index < end else None)
            chunks.append(_Chunk(start, stop, opening))
        return chunks

    def _embed(self, chunk: _Chunk, width: int) -> Tensor:
        """(R, width, d) embeddings of one chunk; memories that open it are formed here."""
        ids = torch.zeros(len(self.rollouts), width, dtype=torch.long)
        for row, (a, b) in enumerate(zip(chunk.start, chunk.stop, strict=True)):
            ids[row, : b - a] = torch.tensor(self.rollouts[row].token_ids[a:b])
        ids = ids.to(self.device)
        piece = self.model.embed(ids.clamp_min(0))
        for kind in KINDS:
            rows = [row for row, opening in enumerate(chunk.opening) if opening is not None and opening.kind is kind]
            if not rows:
                continue
            memory = self._form(kind, rows, chunk)
            self.latents.append(memory)
            index = torch.tensor(rows, device=self.device)
            full = torch.zeros_like(piece).index_copy(0, index, pad(memory, (0, 0, 0, width - memory.shape[1])))
            chosen = torch.zeros(len(self.rollouts), 1, dtype=torch.bool, device=self.device)
            chosen[rows] = True
            piece = torch.where(((ids == LATENT) & chosen)[..., None], full, piece)
        return piece

    def _form(self, kind: MemoryKind, rows: list[int], chunk: _Chunk) -> Tensor:
        index = torch.tensor(rows, device=self.device)
        segments = [self._segment(row, chunk) for row in rows]
        longest = max(b - a for a, b in segments)
        first = torch.tensor([a for a, _ in segments], device=self.device)[:, None]
        length = torch.tensor([b - a for a, b in segments], device=self.device)[:, None]
        offset = torch.arange(longest, device=self.device)
        states = torch.cat(self.seen, dim=1)[index]
        where = self.place[index].gather(1, (first + offset + 1).clamp_max(self.longest))
        segment = states.gather(1, where[..., None].expand(-1, -1, states.shape[-1]))
        stream = self.embeds[index], self.positions[:, index], self.keys[index]
        return self.context.form(kind, self.sample[index], (segment, offset < length), stream)

    def _segment(self, row: int, chunk: _Chunk) -> tuple[int, int]:
        """First and last+1 index of the current segment, up to and including the invoke token."""
        opening = chunk.opening[row]
        assert opening is not None
        earlier = [i for i in self.rollouts[row].invocations if i.position < opening.position]
        start = earlier[-1].position + self.model.length_of(earlier[-1].kind) + 2 if earlier else 0
        return start, opening.position + 1

    def scores(self, sampled_kinds: tuple[MemoryKind, ...], limit: int, temperature: float) -> Scores:
        hidden = self.hidden()
        rows, length = hidden.shape[:2]
        ids = torch.full((rows, length), LATENT)
        mask = torch.zeros(rows, length, dtype=torch.bool)
        full = torch.zeros(rows, length, dtype=torch.bool)
        for row, rollout in enumerate(self.rollouts):
            ids[row, : len(rollout.token_ids)] = torch.tensor(rollout.token_ids)
            mask[row, : len(rollout.token_ids)] = torch.tensor(rollout.loss_mask)
            for invocation in rollout.invocations:  # a word comes first after every memory
                full[row, invocation.position + self.model.length_of(invocation.kind) + 2 :][:1] = True
            if len(rollout.invocations) >= limit > 0:
                full[row, rollout.invocations[limit - 1].position + 1 :] = True
        ids, mask, full = ids.to(self.device), mask.to(self.device), full.to(self.device)
        columns = self.model.column_of(ids)[mask]
        may_invoke = torch.tensor([kind in sampled_kinds and limit > 0 for kind in KINDS], device=self.device)
        barred = full[mask][:, None] | ~may_invoke
        chosen, plain, entropy = token_scores(self.model, hidden[mask], columns, barred, temperature)
        text = columns < self.model.vocabulary

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(rows, length).masked_scatter(mask, values)

        return Scores(
            logprobs=spread(chosen),
            text_logprobs=spread(plain),
            entropy=spread(entropy),
            mask=mask,
            text_mask=torch.zeros_like(mask).masked_scatter(mask, text),
            latents=self.latents,
        )
