"""Where rows stand while they are decoded: slots in a cache, and positions. All executors' own; numpy alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


def room(max_new_tokens: int, memories: int, longest: int) -> int:
    """Slots, and positions, that an answer may take: its words, and memories of `longest` vectors with their tokens."""
    return max_new_tokens + memories * (longest + 2)


class Slots:
    """R rows, each with its own length, so that one row's memory never moves another's."""

    def __init__(self) -> None:
        self.used: Integers = np.zeros(0, np.int64)  # (R,) slots
        self.next = self.used  # (R,) position of the next token, on all axes
        self.segment = self.used  # (R,) slot at which the current segment of the answer starts

    def join(self, used: Sequence[int], following: Sequence[int]) -> None:
        """Add rows behind prompts of `used` tokens, whose next positions are `following`."""
        self.used, self.segment = np.append(self.used, used), np.append(self.segment, used)
        self.next = np.append(self.next, following)

    def take(self, count: int, rows: Sequence[int] | None = None) -> tuple[Integers, Integers]:
        """The slots and the positions (R, count) of the next tokens of `rows` (all, if None); they count as used."""
        index = slice(None) if rows is None else list(rows)
        offsets = np.arange(count)
        found = self.used[index, None] + offsets, self.next[index, None] + offsets
        self.used[index] += count
        self.next[index] += count
        return found

    def open_segment(self, rows: Sequence[int]) -> None:
        """A new segment of `rows` starts behind what they used."""
        self.segment[list(rows)] = self.used[list(rows)]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        index = list(rows)
        self.used, self.next, self.segment = self.used[index], self.next[index], self.segment[index]
