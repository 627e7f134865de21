"""GRPO's losses, the loop's schedule and the optimisers' groups against numbers worked by hand."""

from math import log

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from vismem.generation.replay import padded
from vismem.training import grpo
from vismem.training.grpo import (
    group_advantages,
    kl_term,
    negative_penalty,
    policy_term,
    rollout_means,
    type_penalty,
)
from vismem.training.loop import LoopSettings, batch_at, lr_scale
from vismem.training.optimizers import optimizers


def test_advantages_are_centred_and_divided_by_the_standard_deviation_of_their_group() -> None:
    # Group 1: mean 1/2, deviations of 1/2, so std 1/2. Group 2: mean 1, deviations 1, -1, 0, 0, so std sqrt(2 / 4).
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 1.0, 1.0]])
    expected = torch.tensor([[1.0, -1.0, -1.0, 1.0], [2**0.5, -(2**0.5), 0.0, 0.0]])
    assert_close(group_advantages(rewards), expected, atol=1e-5, rtol=0)


def test_advantages_without_the_standard_deviation_are_only_centred() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 1.0, 1.0]])
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [1.0, -1.0, 0.0, 0.0]])
    assert_close(group_advantages(rewards, normalise_by_std=False), expected)


def test_epsilon_is_added_to_the_standard_deviation() -> None:
    # Deviations of 2e-5 from the mean, so std 2e-5 too: 2e-5 / (2e-5 + 1e-6).
    assert_close(group_advantages(torch.tensor([[0.0, 4e-5]])), torch.tensor([[-20 / 21, 20 / 21]]))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rewards",
    [[1.0] * 4, [0.1 + 0.2, 0.3, 0.3, 0.3], [0.3] * 3, [0.7] * 7, [1 - 0.9, 0.1, 0.1], [100.1 - 100, 0.1, 0.1]],
)
def test_a_group_of_equal_rewards_has_no_advantages_not_even_of_rounding(
    rewards: list[float], dtype: torch.dtype, normalise: bool
) -> None:
    """Beside a group that has some: each has its own threshold."""
    both = torch.tensor([rewards, [1.0, *[0.0] * (len(rewards) - 1)]], dtype=dtype)
    found = group_advantages(both, normalise)
    assert torch.equal(found[0], torch.zeros(len(rewards), dtype=dtype))
    assert found[1].all()


def test_a_deviation_of_exactly_the_bound_is_rounding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "SAME", 0.5)
    assert group_advantages(torch.tensor([[0.0, 1.0], [0.0, 2.0]])).count_nonzero(dim=1).tolist() == [0, 2]


def test_a_small_difference_of_rewards_is_no_rounding() -> None:
    found = group_advantages(torch.tensor([[0.5, 0.5, 0.5, 0.501]]))
    assert_close(found, torch.tensor([[-(3**-0.5)] * 3 + [3**0.5]]), atol=5e-3, rtol=0)


def clipped_objective() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities and old ones with ratios 1.5, 0.5, 1.1 and 1.5, 0.5, 9; advantages 1 and -2; the mask."""
    ratios = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 9.0]])
    old = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -0.1, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return (old + ratios.log()).requires_grad_(), old, torch.tensor([1.0, -2.0]), mask


def test_the_objective_takes_the_smaller_of_the_plain_and_the_clipped_gain() -> None:
    # With bounds 0.8 and 1.3. A = 1: min(1.5, 1.3), min(0.5, 0.8), 1.1 have the mean 2.9 / 3.
    # A = -2: min(-3, -2.6), min(-1, -1.6) have the mean -4.6 / 2. The loss is the negated sum of both.
    term = policy_term(*clipped_objective(), clip_low=0.2, clip_high=0.3)
    assert float(term.loss.detach()) == pytest.approx(-(2.9 / 3) + 4.6 / 2)
    assert (int(term.clipped), int(term.tokens)) == (4, 5), "all but the ratio 1.1, and nothing of the masked token"


def test_the_objective_has_no_gradient_where_it_is_clipped_or_masked() -> None:
    # d(ratio) / d(logprob) is the ratio. Per token -ratio * A / tokens of its row; 0 at 1.5 with A > 0 (above 1.3) and
    # at 0.5 with A < 0 (below 0.8).
    logprobs, *rest = clipped_objective()
    policy_term(logprobs, *rest, clip_low=0.2, clip_high=0.3).loss.backward()
    assert logprobs.grad is not None
    assert_close(logprobs.grad, torch.tensor([[0.0, -0.5 / 3, -1.1 / 3], [1.5, 0.0, 0.0]]))


def test_with_one_length_a_token_weighs_the_same_in_a_long_answer_and_in_a_short_one() -> None:
    # As above, each row divided by 4 in place of its 3 and 2 tokens.
    logprobs, *rest = clipped_objective()
    term = policy_term(logprobs, *rest, clip_low=0.2, clip_high=0.3, length=4)
    assert float(term.loss.detach()) == pytest.approx((-2.9 + 4.6) / 4)
    term.loss.backward()
    assert logprobs.grad is not None
    assert_close(logprobs.grad, torch.tensor([[0.0, -0.5 / 4, -1.1 / 4], [1.5 * 2 / 4, 0.0, 0.0]]))


def test_k3_draws_the_policy_to_the_reference_and_punishes_what_only_the_reference_says_the_most() -> None:
    # d(k3) / d(log pi) = 1 - ref / pi: for pi = 1/2, ref = 1/4 it is 1/2; for pi = 1/4, ref = 1/2 it is -1.
    policy, reference = torch.tensor([0.5, 0.25]).log().requires_grad_(), torch.tensor([0.25, 0.5]).log()
    kl_term(policy, reference).sum().backward()
    assert policy.grad is not None
    assert_close(policy.grad, torch.tensor([0.5, -1.0]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "moves"),
    [(1.5, 1.0, 1.3, False), (1.5, -1.0, -1.5, True), (0.5, 1.0, 0.5, True), (0.5, -1.0, -0.8, False)],
)
def test_the_clip_stops_only_what_has_gone_far_enough(ratio: float, advantage: float, gain: float, moves: bool) -> None:
    """Up for a rewarded token, down for an unrewarded one; on the other side it never holds the policy back."""
    logprobs, old = torch.full((1, 1), log(ratio) - 1.0, requires_grad=True), torch.full((1, 1), -1.0)
    term = policy_term(logprobs, old, torch.tensor([advantage]), torch.ones(1, 1, dtype=torch.bool), 0.2, 0.3)
    term.loss.backward()
    assert float(term.loss.detach()) == pytest.approx(-gain)
    assert logprobs.grad is not None
    assert float(logprobs.grad) == pytest.approx(-ratio * advantage if moves else 0.0)


def test_kl_is_estimated_by_k3_and_is_never_negative() -> None:
    # pi = 1/2, ref = 1/4: 1/2 - log(1/2) - 1. pi = 1/4, ref = 1/2: 2 - log(2) - 1. Equal: 0.
    policy, reference = torch.tensor([0.5, 0.25, 0.3]).log(), torch.tensor([0.25, 0.5, 0.3]).log()
    assert_close(kl_term(policy, reference), torch.tensor([log(2) - 0.5, 1 - log(2), 0.0]))


def test_means_count_the_tokens_of_the_mask_alone() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    assert_close(rollout_means(values, mask), torch.tensor([2.0, 5.0, 0.0]))
    assert_close(rollout_means(values, mask, length=8), torch.tensor([0.5, 0.625, 0.0]))


def test_the_type_penalty_is_how_much_higher_the_other_kind_would_have_scored() -> None:
    rewards, swapped = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 1.0, 0.75])
    assert_close(type_penalty(rewards, swapped), torch.tensor([0.0, 1.0, 0.25]))


def test_the_negative_penalty_is_how_far_a_score_is_below_its_group_s_mean() -> None:
    # The means are 0.4 and 0.75.
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.1], [1.0, 1.0, 1.0, 0.0]])
    assert_close(negative_penalty(rewards), torch.tensor([[0.0, 0.4, 0.0, 0.3], [0.0, 0.0, 0.0, 0.75]]))


def test_p_neg_alone_leaves_the_advantages_of_right_and_wrong_answers_as_they_are() -> None:
    """With scores of 0 and 1 it only stretches a group, and dividing by the standard deviation takes that back."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    shaped = rewards - 0.3 * negative_penalty(rewards)
    assert_close(group_advantages(shaped), group_advantages(rewards), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(group_advantages(shaped, False), group_advantages(rewards, False), atol=1e-2)


def test_rows_are_padded_with_zeros_on_the_right() -> None:
    assert_close(padded([[-1.0], [-2.0, -3.0]], torch.float64), torch.tensor([[-1.0, 0], [-2.0, -3.0]]).double())


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    # Of 10 steps 2 warm up. After that (1 + cos(pi * (step - 2) / 8)) / 2: 1 at step 2, 1/2 at 6, 0.0381 at 9.
    settings = LoopSettings("name", steps=10, learning_rate=1.0, warmup_ratio=0.2)
    scales = [lr_scale(step, settings) for step in (0, 1, 2, 6, 9)]
    assert scales == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0380602], abs=1e-6)


def test_every_pass_over_the_samples_has_each_at_most_once_and_another_order() -> None:
    passes = [[batch_at(2 * number + half, 5, 2, seed=0) for half in (0, 1)] for number in range(3)]
    for first, second in passes:
        assert len({*first, *second}) == 4
        assert {*first, *second} < set(range(5))
    assert len({str(batches) for batches in passes}) == 3
    assert batch_at(3, 5, 2, seed=0) == passes[1][1] != batch_at(3, 5, 2, seed=1)
    assert sorted(batch_at(0, 3, 8, seed=0)) == [0, 1, 2], "a batch larger than the samples has each once"


@pytest.mark.parametrize(("rate", "muon"), [(0.5, {"long.output.weight"}), (0.0, set())])
def test_muon_takes_the_matrices_that_are_no_tables_of_vectors(rate: float, muon: set[str]) -> None:
    matrices = ("long.output.weight", "builder.query_init", "short.memory_init", "embed_tokens.weight")
    parameters = {name: nn.Parameter(torch.zeros(2, 3)) for name in matrices}
    parameters["norm.weight"] = nn.Parameter(torch.zeros(3))
    found, rates = {}, {"norm.weight": 0.3}
    for optimizer in optimizers(parameters, 0.1, rate, 0.2, rates):
        for group in optimizer.param_groups:
            assert group["params"][0] is parameters[group["name"]]
            found[group["name"]] = (type(optimizer).__name__, group["peak"], group["weight_decay"])
    assert found.pop("norm.weight") == ("AdamW", 0.3, 0.2), "a parameter's own rate"
    assert found == {name: ("Muon", 0.5, 0.0) if name in muon else ("AdamW", 0.1, 0.2) for name in matrices}
