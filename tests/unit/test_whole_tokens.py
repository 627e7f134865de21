"""The slots of a short memory take tokens in turn: what each of them sees, worked out by hand."""

import pytest
import torch
from torch import Tensor

from vismem.models.memory import ALIKE, OWN, in_turn


def taken(liked: list[list[float]], real: list[bool]) -> list[int]:
    """The token that each slot takes of one memory."""
    return in_turn(torch.tensor([liked]), torch.tensor([real]))[0].argmax(-1).tolist()


def test_a_slot_takes_what_it_likes_best_of_what_is_left_and_sees_it_by_the_softmax_of_its_scores() -> None:
    shares = in_turn(torch.tensor([[[0.0, 1.0, 0.5], [0.0, 2.0, 0.5]]]), torch.ones(1, 3, dtype=torch.bool))
    first = torch.tensor([0.0, 1.0 + OWN, 0.5]).softmax(-1)
    second = torch.tensor([0.0, 0.5 + OWN]).softmax(-1)  # the token that the first one took is gone
    torch.testing.assert_close(shares[0, 0], first)
    torch.testing.assert_close(shares[0, 1], torch.stack([second[0], torch.tensor(0.0), second[1]]))


def test_where_all_tokens_are_taken_all_are_left_again() -> None:
    likes = [[0.0, 1.0, 3.0, 9.0]] * 5
    assert taken(likes, [True, True, True, False]) == [2, 1, 0, 2, 1]


@pytest.mark.parametrize("rounding", [0.0, ALIKE / 20, -ALIKE / 20])
def test_of_tokens_that_only_rounding_tells_apart_the_first_is_taken(rounding: float) -> None:
    assert taken([[0.0, 0.3, 0.3 + rounding, 0.2]], [True] * 4) == [1]


def test_a_difference_that_counts_is_no_rounding() -> None:
    assert taken([[0.0, 0.3, 0.3 + 2 * ALIKE, 0.2]], [True] * 4) == [2]


def test_each_row_has_its_own_turns_and_no_token_is_seen_where_there_is_none() -> None:
    likes = torch.tensor([[[1.0, 2.0], [1.0, 2.0]], [[2.0, 1.0], [2.0, 1.0]]])
    shares: Tensor = in_turn(likes, torch.tensor([[True, True], [True, True]]))
    assert shares.argmax(-1).tolist() == [[1, 0], [0, 1]]
    assert in_turn(torch.zeros(2, 3, 0), torch.ones(2, 0, dtype=torch.bool)).shape == (2, 3, 0)
