"""The state of R answers that are being decoded: KV cache, embeddings, hidden states and positions.

Every row owns its slots and has its own length, so that one row's memory never moves another's.
"""

import torch
from torch import Tensor

from vismem.generation.context import Context
from vismem.models.backbones.base import Prompt
from vismem.models.kinds import MemoryKind
from vismem.models.vismem import VisMemModel


class RowCache:
    """Keys and values per layer, (B, heads, capacity, head width). `place` says where the next forward pass writes.

    It stands in for a Hugging Face cache: decoder layers call `update` only.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def place(self, slots: Tensor, limit: int, rows: Tensor | None = None) -> None:
        """The next pass writes rows `rows` (R,) (all, if None) at `slots` (R, T) and reads the first `limit` slots."""
        every = torch.arange(len(slots), device=slots.device)
        self.written = (every if rows is None else rows)[:, None], slots
        self.read = slice(None) if rows is None else rows, slice(None), slice(limit)  # all rows: a view, not a copy

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write (R, heads, T, head width) and return the first `limit` slots of the same rows."""
        if layer == len(self.keys):
            shape = (key.shape[0], key.shape[1], self.capacity, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros(shape))
        rows, slots = self.written
        self.keys[layer][rows, :, slots] = key.transpose(1, 2)
        self.values[layer][rows, :, slots] = value.transpose(1, 2)
        return self.keys[layer][self.read], self.values[layer][self.read]

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given rows."""
        self.keys = [layer[rows] for layer in self.keys]
        self.values = [layer[rows] for layer in self.values]


class DecodeState:
    """`group_size` rows per prompt, grouped by prompt. `room`: slots for what will be appended to the longest prompt.

    With `remember`, what memories are formed from is kept for `form`.
    """

    def __init__(self, model: VisMemModel, prompt: Prompt, group_size: int, room: int, remember: bool) -> None:
        self.model, self.backbone, self.remember = model, model.backbone, remember
        longest, device = prompt.embeds.shape[1], prompt.mask.device
        self.cache = RowCache(longest + room)
        self.cache.place(torch.arange(longest, device=device).expand(len(prompt.embeds), -1), longest)
        self.context = Context.read(model, prompt, self.cache)
        self.sample = torch.arange(len(prompt.embeds), device=device).repeat_interleave(group_size)  # each row's prompt
        self.last = self.context.last[self.sample]  # (R, d) the hidden state that the next token follows
        self.used = prompt.mask.sum(1)[self.sample]  # (R,) slots
        self.next = prompt.next_position()[self.sample]
        self.segment = self.used.clone()  # (R,) slot at which the current segment of the answer starts
        if group_size > 1:
            self.cache.select(self.sample)
        if remember:  # only memories read the stream again
            shape = (len(self.sample), self.cache.capacity, self.last.shape[-1])
            self.embeds, self.hidden = prompt.embeds.new_zeros(shape), self.last.new_zeros(shape)
            self.positions = prompt.positions.new_zeros(3, *shape[:2])
            self.embeds[:, :longest] = prompt.embeds[self.sample]
            self.positions[:, :, :longest] = prompt.positions[:, self.sample]

    def append(self, embeds: Tensor, rows: Tensor | None = None) -> None:
        """Append (R, T, d) embeddings to all rows, or to `rows` (R,) of them."""
        index = slice(None) if rows is None else rows
        offsets = torch.arange(embeds.shape[1], device=embeds.device)
        slots = self.used[index, None] + offsets
        positions = (self.next[index, None] + offsets).expand(3, -1, -1)
        limit = int(slots.max()) + 1
        self.cache.place(slots, limit, rows)
        mask = torch.arange(limit, device=embeds.device) <= slots[:, None, :, None]
        forward = self.backbone.step if embeds.shape[1] == 1 else self.backbone.language
        hidden = forward(embeds, positions, mask, self.cache)
        if self.remember:
            self.embeds[self.cache.written], self.hidden[self.cache.written] = embeds, hidden
            self.positions[:, *self.cache.written] = positions
        self.used[index] += embeds.shape[1]
        self.next[index] += embeds.shape[1]
        self.last[index] = hidden[:, -1]

    def insert(self, memory: Tensor, end: int, rows: Tensor) -> None:
        """Append memories (R, N, d) and the token `end` to `rows` (R,): a new segment starts behind them."""
        ends = torch.full((len(rows), 1), end, device=memory.device)
        self.append(torch.cat([memory, self.model.embed(ends)], dim=1), rows)
        self.segment[rows] = self.used[rows]

    def form(self, kind: MemoryKind, rows: Tensor) -> Tensor:
        """The memories (R, N, d) of `kind` in `rows` (R,), whose last token is their invoke token."""
        used, start = self.used[rows], self.segment[rows]
        slots = start[:, None] + torch.arange(int((used - start).max()), device=rows.device)
        segment = self.hidden[rows[:, None], slots.clamp_max(self.cache.capacity - 1)]
        length = int(used.max())
        mask = torch.arange(length, device=rows.device) < used[:, None]
        stream = self.embeds[rows, :length], self.positions[:, rows, :length], mask
        return self.context.form(kind, self.sample[rows], (segment, slots < used[:, None]), stream)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows` (R,)."""
        self.cache.select(rows)
        for name in ("sample", "used", "next", "segment", "last"):
            setattr(self, name, getattr(self, name)[rows])
        if self.remember:
            self.embeds, self.hidden, self.positions = self.embeds[rows], self.hidden[rows], self.positions[:, rows]
