"""Attention within segments against one masked attention over all pairs of patches."""

import pytest
import torch
from torch import Tensor

from vismem.models.backbones.segments import attend, segments

NUMBERS = torch.tensor(
    [
        [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 2],  # as windows lie in merge order: mixed, and smaller at the edge
        [3, 3, 3, 0, 0, -1, -1, -1, -1, -1, -1, -1],
        [-1] * 12,
    ]
)


def dense(query: Tensor, key: Tensor, value: Tensor, numbers: Tensor) -> Tensor:
    mask = (numbers[:, None, :, None] == numbers[:, None, None, :]) & (numbers >= 0)[:, None, :, None]
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0) @ value


@pytest.mark.parametrize("most", [0, 256])
def test_outputs_and_gradients_are_those_of_a_masked_attention(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vismem.models.backbones.segments.DENSE", most)
    real = (NUMBERS >= 0)[:, None, :, None]
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, 2, 12, 4, generator=generator, dtype=torch.double, requires_grad=True) for _ in range(3)]
    weight = torch.randn(3, 2, 12, 4, generator=generator, dtype=torch.double)
    found, wanted = attend(*parts, segments(NUMBERS)) * real, dense(*parts, NUMBERS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((result * weight).sum(), parts) for result in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs.nan_to_num(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("numbers", [NUMBERS, NUMBERS[2:], NUMBERS[:0]])
def test_every_real_patch_stands_in_one_segment(numbers: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vismem.models.backbones.segments.DENSE", 0)
    places = [place for own in segments(numbers) for place in own.flatten().tolist()]
    assert sorted(places) == (numbers >= 0).flatten().nonzero()[:, 0].tolist()
