"""Controls: policies that insert something else than the memory that was asked for, or none (paper Table 3, 9)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.generation.invocation import Learned, Off, StepView, row_generator
from vismem.generation.prompts import encode, shown_again
from vismem.models.backbones.base import Backbone, Prompt
from vismem.models.kinds import MemoryKind


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
            row_generator(seed, key, f"noise {at}").standard_normal(shape)
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
