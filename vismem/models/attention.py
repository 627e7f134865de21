"""Where a memory looked: the attention of its tokens over the images, in the last block that reads them."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from vismem.models.kinds import MemoryKind
from vismem.models.memory import FormationInputs
from vismem.models.tensor_parallel import mean

Map = tuple[tuple[float, ...], ...]  # rows of weights


@dataclass(frozen=True)
class Look:
    """Where one memory looked: the mean over the memory's tokens and the heads.

    Its weights and those of all else (a long memory reads the text, every memory its own tokens) have the sum 1.
    """

    share: float  # of the attention that is on images
    maps: tuple[Map | None, ...]  # of each image, tile or video; None where its tokens are no grid


class Attention(TorchFunctionMode):
    """Within the block, remembers the last attention that reads more than its own tokens; it changes no output.

    `scaled_dot_product_attention` gives no weights: `weights` computes them from what it was called with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: tuple[Tensor, Tensor, Tensor | None, float | None] | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's hook: every call of a function of torch comes here."""
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention and args[1].shape[-2] > args[0].shape[-2]:
            self.called = args[0], args[1], kwargs.get("attn_mask"), kwargs.get("scale")
        return function(*args, **kwargs)

    def weights(self, last: int) -> Tensor:
        """(R, last, keys) of the last queries, the mean over heads; each query's sum is 1."""
        assert self.called is not None
        query, key, mask, scale = self.called
        query, mask = query[:, :, -last:], mask if mask is None else mask[..., -last:, :]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query.float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).mean(1)

    def looks(self, kind: MemoryKind, inputs: FormationInputs, tokens: int, processes: int = 1) -> list[Look]:
        """Where each row's memory looked, whose `tokens` are the last queries; `processes` have some heads each."""
        weights = mean(self.weights(tokens).mean(1), processes)
        read = Row.short if kind is MemoryKind.SHORT else Row.long
        return [read(inputs, row).look(own) for row, own in enumerate(weights)]


@dataclass(frozen=True)
class Row:
    """The image tokens among the keys that one row's memory reads."""

    keys: Tensor  # (n,) where they are
    image: Tensor  # (n,) which image, tile or video
    places: Tensor  # (n, 2) row and column of each

    @classmethod
    def short(cls, inputs: FormationInputs, row: int) -> Self:
        """The patches inside the vision encoder; class tokens stand before those of a tile."""
        assert inputs.patches is not None
        sample, vision = int(inputs.sample[row]), inputs.patches.vision
        count, keys = vision.image.shape[1], inputs.patches.readable.shape[1]
        tiles = int(vision.image.max()) + 1 if keys > count else 1
        index = torch.arange(keys, device=vision.image.device).view(tiles, -1)[:, -(count // tiles) :].flatten()
        real = vision.mask[sample]
        return cls(index[real], vision.image[sample][real], vision.positions[sample][real])

    @classmethod
    def long(cls, inputs: FormationInputs, row: int) -> Self:
        """The prompt's image tokens inside the language model; those of an image stand together."""
        visual = inputs.stream_visual[row].bool()
        starts = visual & ~torch.cat([visual.new_zeros(1), visual[:-1]])
        return cls(visual.nonzero()[:, 0], starts.cumsum(0)[visual] - 1, inputs.positions[1:, row, visual].T)

    def look(self, weights: Tensor) -> Look:
        """The look whose weights over all keys are (keys,)."""
        found = weights[self.keys]
        each = [self.image == image for image in torch.unique(self.image)]
        return Look(float(found.sum()), tuple(self._map(found[own], self.places[own]) for own in each))

    @staticmethod
    def _map(weights: Tensor, places: Tensor) -> Map | None:
        rows, columns = (torch.unique(axis, return_inverse=True) for axis in places.T)
        grid = weights.new_full((len(rows[0]), len(columns[0])), -1)
        grid[rows[1], columns[1]] = weights
        if grid.numel() != len(weights) or (grid < 0).any():
            return None
        return tuple(tuple(row) for row in grid.tolist())
