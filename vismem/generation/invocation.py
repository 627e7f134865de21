"""Invocation policies: whether a memory is formed at each position of an answer, and what is inserted there.

The engine knows no arms: vanilla, ablations, controls and training curricula (paper Table 3 and 9, Sec. 3.4) are
policies. Here are those that differ in when a memory is formed; those that insert something else are in `controls`.
Numpy alone.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vismem.models.kinds import MemoryKind
from vismem.models.tokens import KINDS

if TYPE_CHECKING:
    from vismem.data.sample import Sample
    from vismem.models.backbones.base import Backbone, Prompt

NONE = -1
Choices = NDArray[np.int64]  # per row: NONE, 0 (short) or 1 (long)


@dataclass(frozen=True)
class StepView:
    """What a policy sees of R rows before their next token."""

    keys: tuple[str, ...]  # (R) stable names, `row_key(sample id, member of the group)`
    decision: NDArray[np.int64]  # (R,) tokens decided so far, memories' own tokens not counted
    at_delimiter: NDArray[np.bool_]  # (R,) the last token was a delimiter, or there is none


def row_key(sample_id: str, member: int) -> str:
    """The stable name of one row: its random numbers depend on it, not on the batch it is decoded in."""
    return f"{sample_id}#{member}"


def row_uniforms(seed: int, key: str, use: str, count: int) -> NDArray[np.float64]:
    """`count` uniform numbers in [0, 1) that depend only on the seed, the row's key and the name of their use."""
    return row_generator(seed, key, use).random(count)


def row_generator(seed: int, key: str, use: str) -> np.random.Generator:
    """The generator of these and other random numbers."""
    return np.random.default_rng((seed, zlib.crc32(key.encode()), zlib.crc32(use.encode())))


@dataclass(frozen=True)
class InvocationPolicy:
    """Base class: which invoke tokens may be sampled, which invocations are forced, and what is inserted for them."""

    limit: int | None = None  # max memories per answer, within the model's own limit; None: that limit
    sampled: tuple[MemoryKind, ...] = ()  # kinds whose invoke token the model itself may emit
    best_words: bool = False  # where a word is drawn it is the likeliest: chance decides about memories alone (torch)
    declines: bool = False  # every invoke token that the model emits is declined: a word is decoded in its place
    whole: bool = False  # the prompt shows whole images, whatever `memory.prompt_pixels` says
    base: bool = False  # the bare base answers: the policy's adapter is off

    # --- when a memory comes ---

    def allowed(self, view: StepView) -> NDArray[np.bool_]:
        """(R, 2) where a short, where a long invoke token may be sampled."""
        return np.tile([kind in self.sampled for kind in KINDS], (len(view.keys), 1))

    def force(self, view: StepView, seed: int) -> Choices:
        """Kinds forced before the next token, NONE where the model decides itself."""
        return np.full(len(view.keys), NONE, dtype=np.int64)

    # --- what is inserted ---

    def opened(self, prompt: "Prompt", backbone: "Backbone", samples: Sequence["Sample"]) -> "Prompt":
        """The samples' prompts as answers are decoded behind them; what is added at a row's end counts as latents."""
        return prompt

    def invoked(self, sampled: MemoryKind) -> MemoryKind:
        """The kind that is invoked where the model emitted the invoke token of `sampled`."""
        return sampled

    def donors(self, samples: Sequence["Sample"]) -> list[int] | None:
        """For each sample of a call, the one whose memory its answers are given; None: each forms its own."""
        return None

    def latents(self, memory: Any, view: StepView, seed: int) -> Any:
        """What is inserted in R rows where `memory` (R, N, d) was formed: the same shape, an executor's array."""
        return memory


@dataclass(frozen=True)
class Off(InvocationPolicy):
    """No memory; with `base` the vanilla arm."""

    limit: int | None = 0


@dataclass(frozen=True)
class Learned(InvocationPolicy):
    """The model decides by emitting invoke tokens: the complete method.

    With one kind in `sampled` the other's invocation is skipped and decoding continues (paper Table 3).
    """

    sampled: tuple[MemoryKind, ...] = KINDS


MODES: dict[str, InvocationPolicy] = {  # what a request may ask for, by name
    "learned": Learned(),
    "off": Off(),
    **{kind.value: Learned(sampled=(kind,)) for kind in KINDS},
}


BASE_MODES = MODES | {"vanilla": Off(base=True)}  # where the executor has the base without the policy's adapter


def mode_of(memory: bool | str) -> str:
    """A mode's name: True is "learned" and False "off". Another name is given back as it is."""
    return ("learned" if memory else "off") if isinstance(memory, bool) else memory


@dataclass(frozen=True)
class Random(InvocationPolicy):
    """A memory with chance `probability` at each delimiter, short or long with equal chance (paper Table 9).

    The answer's start counts as a delimiter. At 1 it comes at every delimiter, up to the limit. `anywhere` is the
    chance, at every other position, relative to `probability` (the stage I curriculum).
    """

    probability: float = 0.5
    anywhere: float = 0.0
    kinds: tuple[MemoryKind, ...] = KINDS

    def force(self, view: StepView, seed: int) -> Choices:
        """A row's random numbers depend on its key and its decision alone."""
        choice = super().force(view, seed)
        for row, key in enumerate(view.keys):
            at = int(view.decision[row])
            chance = self.probability * (1.0 if view.at_delimiter[row] else self.anywhere)
            if chance > 0:
                coin, kind = row_uniforms(seed, key, f"invoke {at}", 2)
                if coin < chance:
                    choice[row] = KINDS.index(self.kinds[int(kind * len(self.kinds))])
        return choice


@dataclass(frozen=True)
class Replay(Learned):
    """Memories at recorded decisions of each row: as they were, or every kind swapped (tau_rev of Eq. 14).

    The model samples from the distribution of `Learned`, and an invoke token that it samples elsewhere is declined. So
    the same seed gives the recorded answer itself, and with `swap` the same answer up to its first memory.
    """

    declines: bool = True
    recorded: Mapping[str, Sequence[tuple[int, MemoryKind]]] | None = None
    swap: bool = False

    def force(self, view: StepView, seed: int) -> Choices:
        choice = super().force(view, seed)
        for row, key in enumerate(view.keys):
            for decision, kind in (self.recorded or {}).get(key, ()):
                if decision == view.decision[row]:
                    choice[row] = KINDS.index(kind.other if self.swap else kind)
        return choice
