"""Invocation policies: who decides, at every position of an answer, whether a memory is formed, and of which kind.

The engine knows no arms: vanilla, ablations and training curricula (paper Table 3 and 9, Sec. 3.4) are policies.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vismem.generation.types import MemoryKind

NONE = -1
Choices = NDArray[np.int64]  # a row: NONE, 0 (short) or 1 (long)


@dataclass(frozen=True)
class StepView:
    """What a policy sees of R rows before their next token."""

    keys: tuple[str, ...]  # (R) stable names, `row_key(sample id, member of the group)`
    decision: NDArray[np.int64]  # (R,) tokens decided so far, memories' own tokens not counted
    after_delimiter: NDArray[np.bool_]  # (R,) the last token was a delimiter
    invocations: NDArray[np.int64]  # (R,) memories so far


def row_key(sample_id: str, member: int) -> str:
    """The stable name of one row: its draws depend on it, and not on the batch it is decoded in."""
    return f"{sample_id}#{member}"


def draws(seed: int, key: str, stream: str, count: int) -> NDArray[np.float64]:
    """`count` uniform draws that depend only on the seed, the row and the stream's name."""
    return np.random.default_rng((seed, zlib.crc32(key.encode()), zlib.crc32(stream.encode()))).random(count)


@dataclass(frozen=True)
class InvocationPolicy:
    """Base class: which invoke tokens may be sampled, and which invocations are forced."""

    limit: int | None = None  # memories an answer; None: the model's max_per_answer

    @property
    def sampled(self) -> tuple[MemoryKind, ...]:
        """Kinds whose invoke token the model itself may emit."""
        return ()

    def allowed(self, view: StepView) -> NDArray[np.bool_]:
        """(R, 2) where a short, where a long invoke token may be sampled."""
        kinds = np.array([MemoryKind.SHORT in self.sampled, MemoryKind.LONG in self.sampled])
        return np.tile(kinds, (len(view.keys), 1))

    def force(self, view: StepView, seed: int) -> Choices:
        """Kinds forced before the next token, NONE where the model goes on by itself."""
        return np.full(len(view.keys), NONE, dtype=np.int64)


@dataclass(frozen=True)
class Off(InvocationPolicy):
    """No memory: the vanilla arm."""

    limit: int | None = 0


@dataclass(frozen=True)
class Learned(InvocationPolicy):
    """The model decides by emitting invoke tokens: the complete method."""

    @property
    def sampled(self) -> tuple[MemoryKind, ...]:
        return (MemoryKind.SHORT, MemoryKind.LONG)


@dataclass(frozen=True)
class Only(InvocationPolicy):
    """Short only, or long only: the other kind's invocation is skipped and decoding goes on (paper Table 3)."""

    kind: MemoryKind = MemoryKind.SHORT

    @property
    def sampled(self) -> tuple[MemoryKind, ...]:
        return (self.kind,)


@dataclass(frozen=True)
class Random(InvocationPolicy):
    """A memory with chance `probability` at each delimiter, short or long with equal chance (paper Table 9).

    `anywhere` is the chance, at every other position, relative to `probability` (the stage I curriculum).
    """

    probability: float = 0.5
    at_start: bool = True  # the answer's first position counts as a delimiter
    anywhere: float = 0.0
    kinds: tuple[MemoryKind, ...] = (MemoryKind.SHORT, MemoryKind.LONG)

    def force(self, view: StepView, seed: int) -> Choices:
        """See InvocationPolicy; a row's draws depend on its key and its decision alone."""
        choice = super().force(view, seed)
        for row, key in enumerate(view.keys):
            at = int(view.decision[row])
            delimiter = view.after_delimiter[row] or (at == 0 and self.at_start)
            chance = self.probability * (1.0 if delimiter else self.anywhere)
            if chance > 0:
                coin, kind = draws(seed, key, f"invoke {at}", 2)
                if coin < chance:
                    choice[row] = _index(self.kinds[int(kind * len(self.kinds))])
        return choice


@dataclass(frozen=True)
class Replay(InvocationPolicy):
    """Memories at recorded decisions of each row: as they were, or every kind swapped (tau_rev of Eq. 14).

    Up to the first of them the model samples as `Learned` does, so the same draws give the same answer until there.
    """

    recorded: Mapping[str, Sequence[tuple[int, MemoryKind]]] | None = None
    swap: bool = False

    def allowed(self, view: StepView) -> NDArray[np.bool_]:
        """See InvocationPolicy."""
        return np.tile((view.invocations == 0)[:, None], (1, 2))

    def force(self, view: StepView, seed: int) -> Choices:
        """See InvocationPolicy."""
        choice = super().force(view, seed)
        for row, key in enumerate(view.keys):
            for decision, kind in (self.recorded or {}).get(key, ()):
                if decision == view.decision[row]:
                    choice[row] = _index(kind.other if self.swap else kind)
        return choice


def _index(kind: MemoryKind) -> int:
    return 0 if kind is MemoryKind.SHORT else 1
