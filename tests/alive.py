"""Counts what is allocated: the bytes of tensors that are alive at once, by what operations return."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Within the block, `peak` is the most bytes at a time that tensors of the block's own operations had.

    `counts`: which tensors count; all of them by default. `largest` is the most numbers that one of them had.
    """

    def __init__(self, counts: Callable[[torch.Tensor], bool] = lambda tensor: True) -> None:
        super().__init__()
        self.counts, self.now, self.peak, self.largest = counts, 0, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self.counts(tensor):
                self._add(tensor, given)
        return result

    def _add(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self.known | given:  # a view, or a result in place
            return
        self.known.add(id(storage))
        self.now += storage.nbytes()
        self.largest = max(self.largest, tensor.numel())
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, id(storage), storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __enter__(self) -> Self:
        super().__enter__()
        return self
