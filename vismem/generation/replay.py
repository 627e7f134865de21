"""Replay of recorded answers with gradient: the memories are formed again at the recorded places.

The answers are cut after every invoke token. Chunk by chunk all rows are passed through the language model on one
growing KV cache; between two chunks the next memories are formed from the hidden states computed so far, so the
gradient of a later token reaches the former that made an earlier latent (paper Sec. 3.4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vismem.data.sample import Sample
from vismem.generation.context import Context
from vismem.generation.invocation import InvocationPolicy, Off
from vismem.generation.prompts import encode
from vismem.generation.token_scores import token_scores
from vismem.generation.types import LATENT, Invocation, Rollout
from vismem.models.backbones.base import Prompt
from vismem.models.kinds import MemoryKind
from vismem.models.memory import causal_mask, rows_of
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel

ROWS_TOGETHER = 32  # answers that go through the model at a time
WORDS = Off()  # answers without memories


@dataclass
class Scores:
    """Per-token results of R answers, right-padded to T tokens of `Rollout.token_ids`."""

    logprobs: Tensor  # (R, T) of the recorded tokens, under the temperature and the bars of the sampling
    entropy: Tensor  # (R, T) nats
    mask: Tensor  # (R, T) bool: sampled tokens, the loss mask


def prefill(model: VisMemModel, samples: Sequence[Sample], prompt: Prompt | None = None) -> Context:
    """Run the prompts through the vision encoder (unless `prompt` holds them encoded) and the language model once."""
    prompt = prompt or encode(model.backbone, samples)
    return replace(Context.read(model, prompt, DynamicCache()), samples=samples)


def without_memory(rollout: Rollout) -> Rollout:
    """The same answer with every invocation left out: what the reference policy of stage I reads.

    No policy of a training puts vectors of its own before the answer, as relook does.
    """
    ids, invoked = rollout.token_ids, {invocation.position for invocation in rollout.invocations}
    pairs = enumerate(zip((None, *ids), ids, strict=False))  # an end token follows a latent one
    keep = [LATENT not in pair and at not in invoked for at, pair in pairs]
    per_token = ("token_ids", "loss_mask", "logprobs")
    kept: dict[str, Any] = {name: tuple(compress(getattr(rollout, name), keep)) for name in per_token}
    return replace(rollout, **kept, invocations=(), marked_text=rollout.text)


def with_memories(model: VisMemModel, rollout: Rollout, kinds: Mapping[int, MemoryKind]) -> Rollout:
    """An answer without memories, with one of `kinds` forced before each of these tokens."""
    tokens, invocations = list[tuple[int, bool]](), []
    for place, word in enumerate(rollout.token_ids):
        if kind := kinds.get(place):
            invocations.append(Invocation(len(tokens), kind, forced=True))
            memory = (model.invoke_ids[kind], *[LATENT] * model.length_of(kind), model.end_ids[kind])
            tokens += [(token, False) for token in memory]
        tokens.append((word, True))
    ids, mask = zip(*tokens, strict=True)
    return replace(rollout, token_ids=ids, loss_mask=mask, logprobs=(0.0,) * len(ids), invocations=tuple(invocations))


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
    policy: InvocationPolicy = WORDS,
    temperature: float = 1.0,
) -> Scores:
    """Score recorded answers; `sample` (R,) says which of the context's prompts each answer belongs to.

    `policy` sampled them: it decides which invoke tokens were barred, and whether a word's log-probability is that of
    all words together. By default all are barred, so it is that among words.
    """
    # rows that are cut at like places go through the model together, so that little is padded
    cuts = [[*(i.position for i in rollout.invocations), len(rollout.token_ids)] for rollout in rollouts]
    parts, order = [], sorted(range(len(rollouts)), key=cuts.__getitem__)
    for start in range(0, len(order), ROWS_TOGETHER):
        rows = order[start : start + ROWS_TOGETHER]
        part = _Pass(model, context, [rollouts[row] for row in rows], sample[rows])
        parts.append(part.scores(policy, temperature))
    longest = max(part.mask.shape[1] for part in parts)
    back = torch.tensor(order, device=sample.device).argsort()
    whole = {
        name: torch.cat([pad(getattr(part, name), (0, longest - part.mask.shape[1])) for part in parts])[back]
        for name in ("logprobs", "entropy", "mask")
    }
    return Scores(**whole)


def answer_states(model: VisMemModel, context: Context, rollouts: Sequence[Rollout], sample: Tensor) -> Tensor:
    """(R, T, d): the hidden state from which each token of the recorded answers was predicted."""
    return _Pass(model, context, rollouts, sample).hidden()


class _Pass:
    """One pass over R answers. A chunk ends with an invoke token; the next one begins with the memory's latents."""

    def __init__(self, model: VisMemModel, context: Context, rollouts: Sequence[Rollout], sample: Tensor) -> None:
        self.model, self.context, self.rollouts, self.sample = model, context, rollouts, sample
        self.device = sample.device
        self.ids = padded([rollout.token_ids for rollout in rollouts], torch.long).to(self.device)  # (R, T)
        # what has been read so far, right-padded: the prompt, then chunk after chunk
        self.keys = context.prompt.mask[sample]
        self.embeds = context.prompt.embeds[sample]
        self.positions = context.prompt.positions[:, sample]
        self.seen = context.last[sample][:, None]  # hidden states
        self.place = self.ids.new_zeros(len(sample), self.ids.shape[1] + 1)  # in `seen`

    def hidden(self) -> Tensor:
        """(R, T, d): the hidden state from which each token of the answer was predicted."""
        context, sample, backbone = self.context, self.sample, self.model.backbone
        cache = rows_of(context.cache, sample)
        following = context.prompt.next_position()[sample]
        for chunk, (start, stop) in enumerate(pairwise(self._cuts().unbind(1))):
            lengths = stop - start
            offset = torch.arange(int(lengths.max()), device=self.device)
            real = offset < lengths[:, None]
            token = start[:, None] + offset  # its index in the answer
            piece = self._embed(self.ids.gather(1, token.clamp_max(self.ids.shape[1] - 1)).where(real, 0), chunk)
            at = (following[:, None] + offset).expand(3, -1, -1)
            self.keys = torch.cat([self.keys, real], dim=1)
            hidden = backbone.language(piece, at, causal_mask(self.keys, len(offset)), cache)
            row, column = real.nonzero(as_tuple=True)
            self.place[row, token[real] + 1] = self.seen.shape[1] + column
            self.seen = torch.cat([self.seen, hidden], dim=1)
            self.embeds = torch.cat([self.embeds, piece], dim=1)
            self.positions = torch.cat([self.positions, at], dim=2)
            following = following + lengths
        return _states_at(self.seen, self.place[:, :-1])

    def _cuts(self) -> Tensor:
        """(R, C + 1) the places in the answers between which the chunks lie; chunks that a row lacks are empty."""
        cuts = [[0, *(i.position + 1 for i in r.invocations), len(r.token_ids)] for r in self.rollouts]
        count = max(map(len, cuts))
        return torch.tensor([row + row[-1:] * (count - len(row)) for row in cuts], device=self.device)

    def _embed(self, ids: Tensor, chunk: int) -> Tensor:
        """(R, T, d) embeddings of one chunk's tokens (R, T); memories that begin it are formed here."""
        piece = self.model.embed(ids.clamp_min(0))
        opening = [r.invocations[chunk - 1].kind if 0 < chunk <= len(r.invocations) else None for r in self.rollouts]
        for kind in KINDS:
            rows = [row for row, found in enumerate(opening) if found is kind]
            if not rows:
                continue
            index = torch.tensor(rows, device=self.device)
            memory = self._form(kind, rows, index, chunk)
            places = torch.zeros_like(ids, dtype=torch.bool).index_fill(0, index, True) & (ids == LATENT)
            piece = piece.masked_scatter(places[..., None], memory)
        return piece

    def _form(self, kind: MemoryKind, rows: list[int], index: Tensor, chunk: int) -> Tensor:
        """(rows, N, d) memories of the rows whose invoke token ended the chunk before this one."""
        bounds = []  # first and last + 1 index of each row's current segment, up to and including the invoke token
        for row in rows:
            *earlier, opening = self.rollouts[row].invocations[:chunk]
            bounds.append((self._end(earlier[-1]) if earlier else 0, opening.position + 1))
        first, stop = torch.tensor(bounds, device=self.device)[..., None].unbind(1)
        offset = torch.arange(int((stop - first).max()), device=self.device)
        where = self.place[index].gather(1, (first + offset + 1).clamp_max(self.ids.shape[1]))
        segment = _states_at(self.seen[index], where), offset < stop - first
        stream = self.embeds[index], self.positions[:, index], self.keys[index]
        return self.context.form(kind, self.sample[index], segment, stream)

    def _end(self, invocation: Invocation) -> int:
        """The index behind a memory and its end token."""
        return invocation.position + self.model.length_of(invocation.kind) + 2

    def scores(self, policy: InvocationPolicy, temperature: float) -> Scores:
        hidden, limit = self.hidden(), self.model.limit(policy.limit)
        mask = padded([rollout.loss_mask for rollout in self.rollouts], torch.bool)
        full = torch.zeros_like(mask)
        for row, rollout in enumerate(self.rollouts):
            for invocation in rollout.invocations:  # a word comes first after every memory
                full[row, self._end(invocation) :][:1] = True
            if len(rollout.invocations) >= limit > 0:
                full[row, rollout.invocations[limit - 1].position + 1 :] = True
        mask, full = mask.to(self.device), full.to(self.device)
        if not self.model.invocation_config.anywhere:
            delimiters = torch.tensor(self.model.delimiter_ids, device=self.device)
            full[:, 1:] |= ~torch.isin(self.ids[:, :-1], delimiters)
        columns = self.model.column_of(self.ids)[mask]
        may_invoke = torch.tensor([kind in policy.sampled and limit > 0 for kind in KINDS], device=self.device)
        barred = full[mask][:, None] | ~may_invoke
        found = token_scores(self.model, hidden[mask], columns, barred, temperature, policy.best_words)
        chosen, entropy = (values.new_zeros(mask.shape).masked_scatter(mask, values) for values in found)
        return Scores(chosen, entropy, mask)


def padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    """Rows of numbers as a tensor (R, T), right-padded with zeros."""
    return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)


def _states_at(states: Tensor, where: Tensor) -> Tensor:
    """(R, T, d) of states (R, X, d) at `where` (R, T)."""
    return states.gather(1, where[..., None].expand(-1, -1, states.shape[-1]))
