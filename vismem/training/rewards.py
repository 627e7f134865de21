"""The task score S(tau) of an answer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vismem.data.sample import Sample
from vismem.evaluation.answers import score
from vismem.generation.types import Rollout


def rewards_of(samples: Sequence[Sample], rollouts: Sequence[Rollout]) -> Tensor:
    """(B, G) task scores of B samples' rollouts, which come grouped by sample: 1 for a right answer, else 0."""
    group = len(rollouts) // len(samples)
    scores = [score(samples[i // group], rollout.text) for i, rollout in enumerate(rollouts)]
    return torch.tensor(scores).view(len(samples), group)
