"""Trains the invoke tokens' rows of the head in a space where the states that they read are uncorrelated.

A row is linear in the states, and those of different places have much in common: a step that makes a memory likelier at
the answer's start makes it less likely behind a delimiter whose states point the other way, whatever the reward says
there. In the whitened space a place's gradient moves that place. (Ours: a natural gradient of the row, Amari 1998.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vismem.models.policy import TokenRows

SHARE = 0.01


class Whitening(nn.Module):
    """The head's rows (2, d) as rows of the whitened space times `map` (d, d), whose inverse is `back`."""

    map: Tensor
    back: Tensor

    def __init__(self, map: Tensor, back: Tensor) -> None:
        super().__init__()
        self.register_buffer("map", map)
        self.register_buffer("back", back)

    @classmethod
    def of(cls, states: Tensor, share: float = SHARE) -> Self:
        """`map` is (C + share * tr(C) / d)^-1/2, with C = E[h h'] over `states` (n, d), which are not centred.

        A `share` above 0 bounds the steps in directions in which the states hardly vary.
        """
        moment = sum(piece.double().T @ piece.double() for piece in torch.split(states, 4096)) / len(states)
        values, vectors = torch.linalg.eigh(moment)
        roots = (values.clamp_min(0) + share * values.mean()).sqrt()
        return cls(((vectors / roots) @ vectors.T).float(), ((vectors * roots) @ vectors.T).float())

    def forward(self, rows: Tensor) -> Tensor:
        """The head's rows."""
        return rows @ self.map

    def right_inverse(self, rows: Tensor) -> Tensor:
        """Rows of the whitened space that are the head's."""
        return rows @ self.back


@contextmanager
def whitened(tokens: TokenRows, whitening: Whitening | None) -> Iterator[None]:
    """A block in which the head's rows are a parameter of the whitened space; None: nothing changes."""
    if whitening is None:
        yield
        return
    parametrize.register_parametrization(tokens, "head", whitening)
    try:
        yield
    finally:
        parametrize.remove_parametrizations(tokens, "head")
