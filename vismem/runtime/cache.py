"""What was computed of a content, by its hash, so that the same image or prompt is read once. Bounded."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class ContentCache:
    """Holds at most `most` bytes: who was used the longest ago goes first. Several threads may use it."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self.kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], T], size: Callable[[T], int]) -> T:
        """What is held by `key`, or else what `compute` returns, held from now on if its `size` in bytes fits."""
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                found: T = self.kept[key][0]
                return found
        value = compute()
        bytes_of = size(value)
        with self.lock:
            if key not in self.kept and bytes_of <= self.most:
                self.kept[key] = value, bytes_of
                self.held += bytes_of
                while self.held > self.most:
                    self.held -= self.kept.popitem(last=False)[1][1]
        return value
