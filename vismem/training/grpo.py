"""Group relative policy optimisation as pure functions (paper Sec. 3.4, Eq. 7-8 and 12-15)."""

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-6
SAME = 1e-5  # standard deviation of a group's scores up to which they are one score, and their difference is rounding


def group_advantages(rewards: Tensor, normalise_by_std: bool = True) -> Tensor:
    """A = (S - mean) / (std + eps) within each group; `rewards` (B, G), returns (B, G). Without std: S - mean.

    Exactly 0 throughout a group whose standard deviation is at most `SAME`: dividing by it would make advantages of
    rounding errors, such as that of 0.1 + 0.2 against 0.3.
    """
    deviation = rewards.std(dim=1, keepdim=True, correction=0)
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(deviation <= SAME, 0.0)
    return centred / (deviation + EPSILON) if normalise_by_std else centred


def type_penalty(rewards: Tensor, swapped: Tensor) -> Tensor:
    """p_type = max(0, S(tau_rev) - S(tau)), elementwise (Eq. 14): punishes the wrong kind of memory."""
    return (swapped - rewards).clamp_min(0.0)


def negative_penalty(rewards: Tensor) -> Tensor:
    """p_neg = max(0, mean(S) - S(tau)), mean over the group (Eq. 14); `rewards` (B, G).

    It applies to every trajectory below its group's mean, invoking or not: on invoking ones only it would punish
    invoking as such.
    """
    return (rewards.mean(dim=1, keepdim=True) - rewards).clamp_min(0.0)


@dataclass(frozen=True)
class PolicyTerm:
    """The clipped objective of some rollouts, and its statistics."""

    loss: Tensor  # sum over rollouts, negated: divide by the number of rollouts of the whole batch
    clipped: Tensor  # sampled tokens whose ratio was clipped
    tokens: Tensor  # sampled tokens


def policy_term(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    length: int | None = None,
) -> PolicyTerm:
    """min(rho * A, clip(rho, 1 - low, 1 + high) * A), mean over each rollout's tokens, summed over rollouts (Eq. 8).

    `logprobs`, `old`, `mask` (R, T); `advantages` (R,); `length` as in `rollout_means`. Summed rather than averaged
    over rollouts, so that micro-batches add up to the whole batch whatever their sizes.
    """
    ratio = torch.where(mask, logprobs - old, torch.zeros_like(old)).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantages[:, None], bounded * advantages[:, None])
    return PolicyTerm(
        loss=-rollout_means(gain, mask, length).sum(),
        clipped=(ratio != bounded).sum(),  # never of a masked token, whose ratio is 1
        tokens=mask.sum(),
    )


def kl_term(logprobs: Tensor, reference: Tensor) -> Tensor:
    """k3 estimate of KL(pi || pi_ref) per token: exp(ref - pi) - (ref - pi) - 1, elementwise, never negative."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


def rollout_means(values: Tensor, mask: Tensor, length: int | None = None) -> Tensor:
    """(R,) mean of each row of `values` (R, T) where `mask` is set; 0 for a row with nothing set.

    With `length` the sum is divided by that, the same for all rows, and not by their own number of tokens: a token of
    a long answer then weighs as much as one of a short answer (Dr. GRPO, arXiv 2503.20783).
    """
    return (values * mask).sum(dim=1) / (length or mask.sum(dim=1).clamp_min(1))
