"""A key-value cache in which every row has its own length, so that one row's memory never moves another's."""

import torch
from torch import Tensor


class RowCache:
    """Keys and values per layer, (B, heads, capacity, head width). `place` says where the next forward pass writes.

    It stands in for a Hugging Face cache: decoder layers call `update` only.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._rows: Tensor | None = None
        self._index = self._slots = torch.empty(0)
        self._limit = 0

    def place(self, slots: Tensor, limit: int, rows: Tensor | None = None) -> None:
        """The next pass writes rows `rows` (R,) (all, if None) at `slots` (R, T) and reads the first `limit` slots."""
        self._slots, self._limit, self._rows = slots, limit, rows
        self._index = (torch.arange(len(slots), device=slots.device) if rows is None else rows)[:, None]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write (R, heads, T, head width) and return the first `limit` slots of the same rows."""
        if layer == len(self.keys):
            shape = (key.shape[0], key.shape[1], self.capacity, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros(shape))
        keys, values = self.keys[layer], self.values[layer]
        rows = self._rows
        keys[self._index, :, self._slots] = key.transpose(1, 2)
        values[self._index, :, self._slots] = value.transpose(1, 2)
        if rows is None:
            return keys[:, :, : self._limit], values[:, :, : self._limit]
        return keys[rows, :, : self._limit], values[rows, :, : self._limit]

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given rows."""
        self.keys = [layer[rows] for layer in self.keys]
        self.values = [layer[rows] for layer in self.values]
