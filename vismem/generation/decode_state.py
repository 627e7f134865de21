"""The state of R answers that are being decoded: KV cache, embeddings, hidden states and positions.

Every row owns its slots and has its own length, so that one row's memory never moves another's. Rows join and leave;
what is allocated stays, so that a row which joins takes the place of one that left.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vismem.generation.context import Context
from vismem.generation.slots import Slots
from vismem.models.backbones.base import Prompt
from vismem.models.kinds import MemoryKind
from vismem.models.vismem import VisMemModel


class RowCache:
    """Keys and values per layer, (allocated rows, heads, capacity, head width), of which the first `rows` are in use.

    It stands in for a Hugging Face cache: decoder layers call `update` only. `place` says where the next forward pass
    writes.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity, self.rows = capacity, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def place(self, slots: Tensor, limit: int, rows: Tensor | None = None) -> None:
        """The next pass writes rows `rows` (R,) (all, if None) at `slots` (R, T) and reads the first `limit` slots."""
        every = torch.arange(len(slots), device=slots.device)
        self.written = (every if rows is None else rows)[:, None], slots
        read = slice(len(slots)) if rows is None else rows  # all rows: a view, not a copy
        self.read: Any = read, slice(None), slice(limit)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write (R, heads, T, head width) and return the first `limit` slots of the same rows."""
        if layer == len(self.keys):
            self.rows = len(key)
            shape = (self.rows, key.shape[1], self.capacity, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros(shape))
        rows, slots = self.written
        self.keys[layer][rows, :, slots] = key.transpose(1, 2)
        self.values[layer][rows, :, slots] = value.transpose(1, 2)
        return self.keys[layer][self.read], self.values[layer][self.read]

    def reserve(self, prompts: "RowCache", rows: int, capacity: int) -> None:
        """Allocate, where they are not, `rows` rows of `capacity` slots for keys and values like those of `prompts`."""
        for own, like in ((self.keys, prompts.keys), (self.values, prompts.values)):
            own += [held[:0] for held in like[len(own) :]]
            for layer, held in enumerate(own):
                own[layer] = grown(held, rows, capacity, slots=2)
        self.capacity = max(self.capacity, capacity)

    def add(self, prompts: "RowCache", sample: Tensor) -> None:
        """Append a reserved row for each of `sample` (R,), a copy of that row of `prompts`."""
        new = slice(self.rows, self.rows + len(sample))
        for own, added in ((self.keys, prompts.keys), (self.values, prompts.values)):
            for layer, held in zip(own, added, strict=True):
                layer[new, :, : prompts.capacity] = held[sample]
        self.rows = new.stop

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows` (R,)."""
        self.rows = len(rows)
        for layer in (*self.keys, *self.values):
            layer[: self.rows] = layer[rows]


class DecodeState:
    """No rows at first; `join` adds some."""

    def __init__(self, model: VisMemModel) -> None:
        self.model, self.backbone = model, model.backbone
        self.cache, self.slots = RowCache(), Slots()
        self.sample: list[int] = []  # each row's prompt in its context
        self.last = self.backbone.embedding.weight[:0]  # (R, d) the hidden state that the next token follows
        self.remember = False  # only memories read the stream again
        self.embeds = self.hidden = self.last[:, None]  # (allocated rows, capacity, d)
        self.positions = torch.zeros(0, 1, 3, dtype=torch.long, device=self.backbone.device)  # (rows, capacity, axes)

    def prefill(self, prompt: Prompt) -> Context:
        """The prompts, read for `join` and `form`; no row changes."""
        (count, longest), prompts = prompt.mask.shape, RowCache(prompt.mask.shape[1])
        prompts.place(torch.arange(longest, device=prompt.mask.device).expand(count, -1), longest)
        return Context.read(self.model, prompt, prompts)

    def join(self, context: Context, group_size: int, room: int, remember: bool) -> None:
        """Add `group_size` rows per prompt, grouped by prompt; they take the context's cache over.

        `room`: slots for what will be appended to the longest prompt. With `remember`, the rows can form memories.
        Where memory runs out, no row has changed.
        """
        prompt, prompts, context.cache = context.prompt, context.cache, None
        (count, longest), first, device = prompt.mask.shape, self.cache.rows, prompt.mask.device
        sample = torch.arange(count, device=device).repeat_interleave(group_size)
        new = slice(first, first + len(sample))
        self.cache.reserve(prompts, new.stop, longest + room)
        if remember or self.remember:
            kept = (self.embeds, self.hidden, self.positions)
            larger = [grown(held, new.stop, self.cache.capacity, slots=1) for held in kept]
            self.remember, (self.embeds, self.hidden, self.positions) = True, larger
            self.embeds[new, :longest] = prompt.embeds[sample]
            self.positions[new, :longest] = prompt.positions[:, sample].permute(1, 2, 0)
        self.cache.add(prompts, sample)
        self.sample += sample.tolist()
        self.slots.join(prompt.mask.sum(1)[sample].tolist(), prompt.next_position()[sample].tolist())
        self.last = torch.cat([self.last, context.last[sample]])

    def append(self, embeds: Tensor, rows: Sequence[int] | None = None) -> None:
        """Append (R, T, d) embeddings to all rows, or to some of them."""
        taken, following = self.slots.take(embeds.shape[1], rows)
        index = None if rows is None else torch.tensor(rows, device=embeds.device)
        slots, limit = torch.from_numpy(taken).to(embeds.device), int(taken.max()) + 1
        positions = torch.from_numpy(following).to(embeds.device).expand(3, -1, -1)
        self.cache.place(slots, limit, index)
        mask = torch.arange(limit, device=embeds.device) <= slots[:, None, :, None]
        forward = self.backbone.step if embeds.shape[1] == 1 else self.backbone.language
        hidden = forward(embeds, positions, mask, self.cache)
        if self.remember:
            self.embeds[self.cache.written], self.hidden[self.cache.written] = embeds, hidden
            self.positions[self.cache.written] = positions.permute(1, 2, 0)
        self.last[slice(None) if index is None else index] = hidden[:, -1]

    def insert(self, memory: Tensor, end: int, rows: Sequence[int]) -> None:
        """Append memories (R, N, d) and the token `end` to some rows: a new segment starts behind them."""
        ends = torch.full((len(rows), 1), end, device=memory.device)
        self.append(torch.cat([memory, self.model.embed(ends)], dim=1), rows)
        self.slots.open_segment(rows)

    def form(self, kind: MemoryKind, context: Context, rows: Sequence[int]) -> Tensor:
        """The memories (R, N, d) of `kind` in some rows of a context, whose last token is their invoke token."""
        index = torch.tensor(rows, device=self.backbone.device)
        used, start = (
            torch.from_numpy(of[list(rows)]).to(index.device) for of in (self.slots.used, self.slots.segment)
        )
        slots = start[:, None] + torch.arange(int((used - start).max()), device=index.device)
        segment = self.hidden[index[:, None], slots.clamp_max(self.cache.capacity - 1)]
        length = int(used.max())
        mask = torch.arange(length, device=index.device) < used[:, None]
        stream = self.embeds[index, :length], self.positions[index, :length].permute(2, 0, 1), mask
        sample = torch.tensor([self.sample[row] for row in rows], device=index.device)
        return context.form(kind, sample, (segment, slots < used[:, None]), stream)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        index = torch.tensor(rows, dtype=torch.long, device=self.backbone.device)
        self.cache.keep(index)
        self.slots.keep(rows)
        self.sample, self.last = [self.sample[row] for row in rows], self.last[index]
        if self.remember:
            for held in (self.embeds, self.hidden, self.positions):
                held[: len(rows)] = held[index]


def grown(held: Tensor, rows: int, capacity: int, slots: int) -> Tensor:
    """`held` with at least `rows` rows, along axis 0, and `capacity` slots, along axis `slots`; new ones are zero."""
    shape = list(held.shape)
    if shape[0] >= rows and shape[slots] >= capacity:
        return held
    shape[0], shape[slots] = max(shape[0], rows), max(shape[slots], capacity)
    larger = held.new_zeros(shape)
    larger[: len(held)].narrow(slots, 0, held.shape[slots]).copy_(held)
    return larger
