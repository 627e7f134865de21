"""The optimisers of every training here: AdamW, and where a rate for matrices is given, Muon on the matrices."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# Tables of vectors rather than maps between spaces, which Muon is for.
TABLES = ("embed_tokens.weight", "head.weight", "position_embedding.weight", "_init")


def optimizers(
    parameters: Mapping[str, nn.Parameter], learning_rate: float, matrix_learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW on all parameters; with a `matrix_learning_rate`, Muon on the matrices and AdamW on the rest.

    Every parameter has a group of its own, with its name under "name" and its peak rate under "peak".
    """
    rest: list[dict[str, Any]] = []
    matrices: list[dict[str, Any]] = []
    for name, weight in parameters.items():
        is_matrix = matrix_learning_rate > 0 and weight.ndim == 2 and not name.endswith(TABLES)
        peak = matrix_learning_rate if is_matrix else learning_rate
        (matrices if is_matrix else rest).append({"params": [weight], "name": name, "peak": peak})
    made: list[torch.optim.Optimizer] = []
    if rest:
        made.append(torch.optim.AdamW(rest, lr=learning_rate, weight_decay=weight_decay))
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=matrix_learning_rate, weight_decay=0.0, momentum=0.95))
    return made
