"""The optimisers of every training here: AdamW, and where a rate for matrices is given, Muon on the matrices."""

from collections.abc import Mapping

import torch
from torch import nn

# Tables of vectors rather than maps between spaces, which Muon is for.
TABLES = ("embed_tokens.weight", "head.weight", "position_embedding.weight", ".start")


def optimizers(
    parameters: Mapping[str, nn.Parameter],
    learning_rate: float,
    matrix_learning_rate: float = 0.0,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> list[torch.optim.Optimizer]:
    """AdamW on all parameters; with a `matrix_learning_rate`, Muon on the matrices and AdamW on the rest.

    Every parameter has a group of its own, with its name under "name" and its peak rate under "peak".
    """
    matrices = {
        name for name, weight in parameters.items() if matrix_learning_rate and weight.ndim == 2 if not _is_table(name)
    }
    rest = [{"params": [weight], "name": name} for name, weight in parameters.items() if name not in matrices]
    chosen = [{"params": [weight], "name": name} for name, weight in parameters.items() if name in matrices]
    made: list[torch.optim.Optimizer] = []
    if rest:
        made.append(torch.optim.AdamW(rest, lr=learning_rate, betas=betas, weight_decay=weight_decay))
    if chosen:
        made.append(torch.optim.Muon(chosen, lr=matrix_learning_rate, weight_decay=0.0, momentum=0.95))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def _is_table(name: str) -> bool:
    return name.endswith(TABLES)
