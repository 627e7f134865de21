"""The head's rows, trained in the space where the states that they read are uncorrelated."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from vismem.models.policy import TokenRows
from vismem.training.whitening import Whitening, whitened

WIDTH = 6
START, LATER = torch.tensor([3.0, 1, 0, 0, 0, 0]), torch.tensor([-3.0, 1, 0, 0, 0, 0])  # two places, nearly opposite


def states(count: int = 4000) -> Tensor:
    """Of both places, equally many, with some noise."""
    drawn = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))
    return torch.stack([START, LATER])[torch.arange(count) % 2] + 0.3 * drawn


def rows() -> TokenRows:
    drawn = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    return TokenRows(drawn[0], drawn[1])


def test_the_states_that_the_rows_read_become_uncorrelated_and_of_one_size() -> None:
    seen, space = states(), Whitening.of(states(), share=0)
    read = seen @ space.map  # of the row's own numbers, as `forward` takes them
    torch.testing.assert_close(read.T @ read / len(read), torch.eye(WIDTH), rtol=0, atol=1e-3)


def test_a_share_of_their_variance_bounds_the_steps_where_they_do_not_vary() -> None:
    flat = states()
    flat[:, -1] = 0
    sizes = torch.linalg.eigvalsh(Whitening.of(flat, share=0.01).map)
    mean = float((flat**2).mean())
    assert float(sizes.max()) == pytest.approx((0.01 * mean) ** -0.5, rel=1e-3)


def test_nothing_changes_until_a_step_is_taken_and_what_it_changes_stays() -> None:
    tokens = rows()
    before, names = deepcopy(tokens.state_dict()), [name for name, _ in tokens.named_parameters()]
    with whitened(tokens, Whitening.of(states(), share=0.01)):
        torch.testing.assert_close(tokens.head.data, before["head"])
        (inner,) = {name for name, _ in tokens.named_parameters()} - {*names}
        with torch.no_grad():
            tokens.get_parameter(inner).add_(1.0)
        moved = tokens.head.detach().clone()
    assert not torch.allclose(moved, before["head"])
    assert {name for name, _ in tokens.named_parameters()} == {*names}
    torch.testing.assert_close(tokens.head.data, moved)


@pytest.mark.parametrize("share", [None, 0.01])
def test_a_gradient_step_raises_both_chances_that_pay_in_the_whitened_space_alone(share: float | None) -> None:
    """A memory pays at both places, twice as much at the start, where the states nearly point the other way."""
    tokens = rows()

    def logits() -> Tensor:
        return torch.stack([START, LATER]) @ tokens.head[0]

    with whitened(tokens, None if share is None else Whitening.of(states(), share)):
        before = logits().detach()
        optimizer = torch.optim.SGD(tokens.parameters(), lr=0.01)
        (-(logits() * torch.tensor([2.0, 1.0])).sum()).backward()
        optimizer.step()
        start, later = (logits().detach() - before).tolist()
    assert start > 0.01
    assert (later > 0.0) == (share is not None)
