"""The optimisers of every training here: AdamW, and where a rate for matrices is given, Muon on the matrices.

They update float32 weights only. The unit of a bfloat16 weight's last place is 2^-8 to 2^-7 of it: added to it, most
updates would round away.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

# Tables of vectors rather than maps between spaces, which Muon is for.
TABLES = ("embed_tokens.weight", "head.weight", "position_embedding.weight", "_init")


@contextmanager
def master_weights(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """The weights to optimise: each parameter itself or, where it is of a lower precision, a float32 copy of it.

    Within the block such a parameter's gradient moves to its copy as soon as it is made, so micro-batches add up in
    float32. `round_masters` brings the copies back. Bytes per parameter with AdamW: 18, of them 2 its own.
    """
    masters, hooks = dict(parameters), []
    for name, weight in parameters.items():
        if weight.dtype.itemsize < torch.float32.itemsize:
            masters[name] = nn.Parameter(weight.detach().float())
            move = partial(_move_gradient, masters[name])
            hooks.append(weight.register_post_accumulate_grad_hook(move))  # type: ignore[no-untyped-call]
    try:
        yield masters
    finally:
        for hook in hooks:
            hook.remove()


def _move_gradient(master: nn.Parameter, weight: torch.Tensor) -> None:
    assert weight.grad is not None
    gradient, weight.grad = weight.grad.float(), None
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)


@torch.no_grad()
def round_masters(masters: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> None:
    """Give the parameters the values of their masters, rounded to their precision."""
    for name, weight in parameters.items():
        if masters[name] is not weight:
            weight.copy_(masters[name])


def optimizers(
    parameters: Mapping[str, nn.Parameter],
    learning_rate: float,
    matrix_learning_rate: float,
    weight_decay: float,
    rates: Mapping[str, float] = {},
) -> list[torch.optim.Optimizer]:
    """AdamW on all parameters; with a `matrix_learning_rate`, Muon on the matrices and AdamW on the rest.

    Every parameter has a group of its own, with its name under "name" and its peak rate, `rates`' where it is named
    there, under "peak".
    """
    rest: list[dict[str, Any]] = []
    matrices: list[dict[str, Any]] = []
    for name, weight in parameters.items():
        is_matrix = matrix_learning_rate > 0 and weight.ndim == 2 and not name.endswith(TABLES)
        peak = rates.get(name, matrix_learning_rate if is_matrix else learning_rate)
        (matrices if is_matrix else rest).append({"params": [weight], "name": name, "peak": peak})
    made: list[torch.optim.Optimizer] = []
    if rest:
        made.append(torch.optim.AdamW(rest, lr=learning_rate, weight_decay=weight_decay))
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=matrix_learning_rate, weight_decay=0.0, momentum=0.95))
    return made
