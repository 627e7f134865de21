"""What tests share about memories: recording how they are formed, and holding a replay to what was decoded."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
from torch import Tensor

from vismem.generation.replay import Scores
from vismem.generation.types import Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.memory import FormationInputs
from vismem.models.vismem import VisMemModel

Formed = list[tuple[MemoryKind, FormationInputs, Tensor]]
Result = TypeVar("Result")


def recorded(model: VisMemModel, work: Callable[[], Result]) -> tuple[Result, Formed]:
    """What `work` returns, and every memory that it forms, with what it was formed from."""
    found: Formed = []
    with pytest.MonkeyPatch.context() as patch:
        form = model.form

        def recording(kind: MemoryKind, inputs: FormationInputs) -> Tensor:
            found.append((kind, inputs, form(kind, inputs)))
            return found[-1][2]

        patch.setattr(model, "form", recording)
        return work(), found


def assert_replayed(model: VisMemModel, rollouts: Sequence[Rollout], scores: Scores) -> None:
    """The replay scored what decoding scored, and its gradient reaches every part of both formers."""
    for row, rollout in enumerate(rollouts):
        for index, (sampled, expected) in enumerate(zip(rollout.loss_mask, rollout.logprobs, strict=True)):
            if sampled:
                assert float(scores.logprobs[row, index].detach()) == pytest.approx(expected, abs=1e-4)
    model.zero_grad()
    scores.logprobs.sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("short.", "long.", "builder.")):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
