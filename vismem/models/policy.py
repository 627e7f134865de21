"""The weights that are the policy's own: the new tokens' rows, and a copy of them with its adapter, as a reference."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from vismem.models.lora import Lora


class TokenRows(nn.Module):
    """The four new rows of the embedding matrix and of the output head (Eq. 3), in the order of MEMORY_TOKENS."""

    def __init__(self, embedding: Tensor, head: Tensor) -> None:
        super().__init__()
        self.invoke = nn.Parameter(embedding[:2].clone())
        self.end = nn.Parameter(embedding[2:].clone())
        self.head = nn.Parameter(head[:2].clone())  # end tokens are never sampled: they need no head
        self.bias = nn.Parameter(torch.zeros(2))

    @property
    def fitted(self) -> bool:
        """Whether a stage II has begun with them (see `fit_invocation`)."""
        return bool(self.bias.any())


class PolicyWeights(nn.Module):
    """A frozen copy of the policy's own weights: the new tokens' rows, and its adapter's matrices."""

    def __init__(self, tokens: TokenRows, lora: Lora) -> None:
        super().__init__()
        self.tokens, self.down, self.up = deepcopy(tokens), deepcopy(lora.down), deepcopy(lora.up)
        self.requires_grad_(False)
