"""The sum of the processes' gradients: few calls, each of many parameters, and the same numbers as one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vismem.training import loop


class Two:
    """Stands for two processes with the same gradients."""

    num_processes = 2

    def __init__(self) -> None:
        self.sizes = list[int]()

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        self.sizes.append(tensor.numel())
        return 2 * tensor


@pytest.mark.parametrize(("most", "sizes"), [(1000, [19]), (10, [6, 9, 4]), (1, [6, 8, 1, 4]), (14, [14, 5])])
def test_gradients_are_added_up_in_few_calls_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch, most: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(loop, "REDUCED", most)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (8,), (), (1, 4))]
    for number, parameter in enumerate(parameters[:3]):
        parameter.grad = torch.full_like(parameter, number + 1)
    accelerator: Any = Two()
    loop.all_reduce_gradients(parameters, accelerator)
    assert accelerator.sizes == sizes
    for parameter, value in zip(parameters, (2, 4, 6, 0), strict=True):  # one without a gradient has zeros
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.full_like(parameter, value))
