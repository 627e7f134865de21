"""Where memory may be called: at the answer's start and behind delimiters, or anywhere."""

from pathlib import Path

import pytest
import tiny
import torch

from vismem.config import InvocationConfig
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Learned, Random
from vismem.generation.replay import prefill, score
from vismem.generation.types import Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.tokens import delimiter_ids
from vismem.models.vismem import VisMemModel

LETTERS = tuple("aeiou,.")  # as delimiters, so that some are spoken
LENGTH = 16


def eager(base: Path, anywhere: bool) -> VisMemModel:
    model = tiny.eager(base)
    model.invocation_config = InvocationConfig(max_per_answer=LENGTH, anywhere=anywhere)
    model.delimiter_ids = delimiter_ids(model.backbone.processor.tokenizer, LETTERS)
    return model


def answers(model: VisMemModel, policy: InvocationPolicy) -> list[Rollout]:
    return generate(model, tiny.samples(), policy, max_new_tokens=LENGTH, temperature=1.0, group_size=3)


def places(model: VisMemModel, rollouts: list[Rollout]) -> set[str]:
    """Behind what the memories stand."""
    found = set()
    for rollout in rollouts:
        for at in (invocation.position for invocation in rollout.invocations):
            delimiter = at > 0 and rollout.token_ids[at - 1] in model.delimiter_ids
            found.add("start" if at == 0 else "delimiter" if delimiter else "word")
    return found


@pytest.mark.parametrize("anywhere", [True, False])
def test_the_model_calls_memory_where_it_may_and_is_scored_by_what_it_could_choose_from(
    tiny_base: Path, anywhere: bool
) -> None:
    model = eager(tiny_base, anywhere)
    rollouts = answers(model, Learned())
    assert places(model, rollouts) == {"start", "delimiter"} | ({"word"} if anywhere else set())
    assert {invocation.kind for rollout in rollouts for invocation in rollout.invocations} == set(MemoryKind)
    sample = torch.arange(len(tiny.samples())).repeat_interleave(3)
    with torch.no_grad():
        scores = score(model, prefill(model, tiny.samples()), rollouts, sample, Learned())
    for rollout, logprobs in zip(rollouts, scores.logprobs, strict=True):
        assert logprobs[: len(rollout.logprobs)].tolist() == pytest.approx(rollout.logprobs, abs=1e-4)


def test_what_is_forced_is_not_barred(tiny_base: Path) -> None:
    model = eager(tiny_base, anywhere=False)
    assert "word" in places(model, answers(model, Random(probability=0.5, anywhere=0.5)))
