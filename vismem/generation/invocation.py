"""Invocation policies: whether a memory is formed at each position of an answer, and what is inserted there.

The engine knows no arms: vanilla, ablations, controls and training curricula (paper Table 3 and 9, Sec. 3.4) are
policies. First those that differ in when a memory is formed, then the controls, which insert something else instead.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.generation.prompts import encode, shown_again
from vismem.models.backbones.base import Backbone, Prompt
from vismem.models.kinds import MemoryKind
from vismem.models.tokens import KINDS

NONE = -1
Choices = NDArray[np.int64]  # per row: NONE, 0 (short) or 1 (long)


@dataclass(frozen=True)
class StepView:
    """What a policy sees of R rows before their next token."""

    keys: tuple[str, ...]  # (R) stable names, `row_key(sample id, member of the group)`
    decision: NDArray[np.int64]  # (R,) tokens decided so far, memories' own tokens not counted
    after_delimiter: NDArray[np.bool_]  # (R,) the last token was a delimiter
    invocations: NDArray[np.int64]  # (R,) memories so far


def row_key(sample_id: str, member: int) -> str:
    """The stable name of one row: its random numbers depend on it, not on the batch it is decoded in."""
    return f"{sample_id}#{member}"


def row_uniforms(seed: int, key: str, use: str, count: int) -> NDArray[np.float64]:
    """`count` uniform numbers in [0, 1) that depend only on the seed, the row's key and the name of their use."""
    return _generator(seed, key, use).random(count)


def _generator(seed: int, key: str, use: str) -> np.random.Generator:
    return np.random.default_rng((seed, zlib.crc32(key.encode()), zlib.crc32(use.encode())))


@dataclass(frozen=True)
class InvocationPolicy:
    """Base class: which invoke tokens may be sampled, which invocations are forced, and what is inserted for them."""

    limit: int | None = None  # max memories per answer, within the model's own limit; None: that limit
    sampled: tuple[MemoryKind, ...] = ()  # kinds whose invoke token the model itself may emit
    declines: bool = False  # every invoke token that the model emits is declined: a word is decoded in its place
    whole: bool = False  # the prompt shows whole images, whatever `memory.prompt_pixels` says

    # --- when a memory comes ---

    def allowed(self, view: StepView) -> NDArray[np.bool_]:
        """(R, 2) where a short, where a long invoke token may be sampled."""
        return np.tile([kind in self.sampled for kind in KINDS], (len(view.keys), 1))

    def force(self, view: StepView, seed: int) -> Choices:
        """Kinds forced before the next token, NONE where the model decides itself."""
        return np.full(len(view.keys), NONE, dtype=np.int64)

    # --- what is inserted ---

    def opened(self, prompt: Prompt, backbone: Backbone, samples: Sequence[Sample]) -> Prompt:
        """The samples' prompts as answers are decoded behind them; what is added at a row's end counts as latents."""
        return prompt

    def invoked(self, sampled: MemoryKind) -> MemoryKind:
        """The kind that is invoked where the model emitted the invoke token of `sampled`."""
        return sampled

    def donors(self, samples: Sequence[Sample]) -> list[int] | None:
        """For each sample of a call, the one whose memory its answers are given; None: each forms its own."""
        return None

    def latents(self, memory: Tensor, view: StepView, seed: int) -> Tensor:
        """What is inserted in R rows where `memory` (R, N, d) was formed: the same shape."""
        return memory


@dataclass(frozen=True)
class Off(InvocationPolicy):
    """No memory: the vanilla arm."""

    limit: int | None = 0


@dataclass(frozen=True)
class Learned(InvocationPolicy):
    """The model decides by emitting invoke tokens: the complete method.

    With one kind in `sampled` the other's invocation is skipped and decoding continues (paper Table 3).
    """

    sampled: tuple[MemoryKind, ...] = KINDS


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
            chance = self.probability * (1.0 if view.after_delimiter[row] or at == 0 else self.anywhere)
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


@dataclass(frozen=True)
class Swapped(Learned):
    """Control: the model decides where, and each memory is of the other kind than it asked for."""

    def invoked(self, sampled: MemoryKind) -> MemoryKind:
        return sampled.other


@dataclass(frozen=True)
class OfKind(Learned):
    """Control: the model decides where, and each memory is of one kind, whichever it asked for."""

    kind: MemoryKind = MemoryKind.SHORT

    def invoked(self, sampled: MemoryKind) -> MemoryKind:
        return self.kind


@dataclass(frozen=True)
class Noise(Learned):
    """Control: Gaussian noise of exactly the mean and standard deviation, over N and d, of the memory formed there."""

    def latents(self, memory: Tensor, view: StepView, seed: int) -> Tensor:
        """A row's random numbers depend on its key and its decision alone."""
        shape = memory.shape[1:]
        drawn = [
            _generator(seed, key, f"noise {at}").standard_normal(shape)
            for key, at in zip(view.keys, view.decision.tolist(), strict=True)
        ]
        noise = torch.from_numpy(np.stack(drawn)).to(memory.device, torch.float32)
        scale = memory.float().std((1, 2), keepdim=True) / noise.std((1, 2), keepdim=True)
        centred = noise - noise.mean((1, 2), keepdim=True)
        return (memory.float().mean((1, 2), keepdim=True) + scale * centred).to(memory.dtype)


@dataclass(frozen=True)
class Shuffled(Learned):
    """Control: another sample's memory of the same kind, as that sample forms it at its own answer's start.

    The donor is the next sample of the `generate` call, cyclically, that shows something else; where all show the same,
    the next one. So, unlike all other policies, this one depends on the batch by nature: its answers are the same only
    beside the same samples.
    """

    def donors(self, samples: Sequence[Sample]) -> list[int]:
        """UserError for a call with one sample."""
        count = len(samples)
        if count < 2:
            raise UserError(
                "shuffled memories come from another sample of the same call, and there is only one: "
                "decode at least two together (evaluate.batch_size, evaluate.limit)"
            )
        shown = [(sample.images, sample.videos) for sample in samples]
        found = []
        for own in range(count):
            others = [other % count for other in range(own + 1, own + count)]
            found.append(next((other for other in others if shown[other] != shown[own]), others[0]))
        return found


@dataclass(frozen=True)
class Relook(Off):
    """Control: no memory, but the prompt's images and videos once more, and whole, at the answer's start.

    The costly alternative that memory must be measured against: all their tokens are read behind the prompt.
    """

    def opened(self, prompt: Prompt, backbone: Backbone, samples: Sequence[Sample]) -> Prompt:
        whole = prompt if backbone.prompt_pixels is None else encode(backbone, samples, whole=True)
        return shown_again(prompt, whole, backbone.image_markers)


@dataclass(frozen=True)
class FullResolution(Off):
    """Control: no memory, whole images in the prompt: what a coarse prompt is compared with, in score and in time."""

    whole: bool = True
