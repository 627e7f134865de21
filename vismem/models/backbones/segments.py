"""Attention of patches within their segments (windows, images), without a mask over all pairs of patches."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def segments(numbers: Tensor) -> list[Tensor]:
    """Where each segment's patches are, for each size of segment: (segments, size) places in S * P.

    `numbers` (S, P): which segment of its sample a patch belongs to, -1: to none.
    """
    real = (numbers >= 0).flatten()
    of_sample = torch.arange(len(numbers), device=numbers.device)[:, None] * numbers.shape[1]
    numbered = (of_sample + numbers).flatten()[real]
    places = real.nonzero()[:, 0][numbered.argsort(stable=True)]
    counts = numbered.bincount()
    counts = counts[counts > 0]
    starts = counts.cumsum(0) - counts
    return [
        places[starts[counts == size][:, None] + torch.arange(size, device=numbers.device)]
        for size in torch.unique(counts).tolist()
    ]


def attend(query: Tensor, key: Tensor, value: Tensor, places: list[Tensor]) -> Tensor:
    """What each patch (S, heads, P, width) reads of its segment; patches of none get zeros."""
    flat = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    found = torch.zeros_like(flat[0])
    for own in places:
        queries, keys, values = (each[own].transpose(1, 2) for each in flat)
        found[own] = scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
    return found.view(len(query), -1, *found.shape[1:]).transpose(1, 2)
