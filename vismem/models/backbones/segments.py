"""Attention of patches within their segments (windows, images), without a mask over all pairs of many patches."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DENSE = 256  # patches of a sample: up to so many one masked attention is less work than one for each size of segment
Segments = Tensor | list[Tensor]


def segments(numbers: Tensor) -> Segments:
    """Where each segment's patches are, for each size of segment: (segments, size) places in S * P.

    `numbers` (S, P): which segment of its sample a patch belongs to, -1: to none. Where P is at most DENSE: the pairs
    of one segment, (S, 1, P, P).
    """
    if numbers.shape[1] <= DENSE:
        return numbers[:, None, :, None] == numbers[:, None, None, :]
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


def attend(query: Tensor, key: Tensor, value: Tensor, places: Segments) -> Tensor:
    """What each patch (S, heads, P, width) reads of its segment; what patches of none get means nothing."""
    if isinstance(places, Tensor):
        return scaled_dot_product_attention(query, key, value, attn_mask=places)
    flat = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    found = torch.zeros_like(flat[0])
    for own in places:
        queries, keys, values = (each[own].transpose(1, 2) for each in flat)
        found[own] = scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
    return found.view(len(query), -1, *found.shape[1:]).transpose(1, 2)
