"""Rollouts that take the likeliest words: only whether a memory is invoked, and which, is drawn."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_stages
import torch

from vismem.generation.engine import generate
from vismem.generation.invocation import Learned, Off, Replay, row_key
from vismem.generation.replay import decisions_of, prefill, score
from vismem.generation.types import Rollout
from vismem.models.vismem import VisMemModel

GROUP = 4
DRAWN: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.0, "seed": 2, "group_size": GROUP}


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    """A model that likes to invoke."""
    return tiny.eager(tiny_base)


@pytest.fixture
def rollouts(model: VisMemModel) -> list[Rollout]:
    found = generate(model, tiny.samples(), Learned(best_words=True), **DRAWN)
    assert len({rollout.token_ids for rollout in found}) > len(tiny.samples()), "chance decides about memories"
    return found


def test_without_memories_they_are_the_greedy_answers(model: VisMemModel) -> None:
    found = generate(model, tiny.samples(), Off(best_words=True), **DRAWN)
    greedy = generate(model, tiny.samples(), Off(), max_new_tokens=16)
    assert [rollout.token_ids for rollout in found] == [each.token_ids for each in greedy for _ in range(GROUP)]


def test_a_memory_has_the_chance_that_it_has_where_words_are_drawn(model: VisMemModel, rollouts: list[Rollout]) -> None:
    words_too = generate(model, tiny.samples(), Learned(), **DRAWN)
    invokes = model.invoke_ids.values()
    first = [[rollout.token_ids[0] in invokes for rollout in found] for found in (rollouts, words_too)]
    assert first[0] == first[1]  # the same numbers are drawn
    assert 0 < sum(first[0]) < len(rollouts)


def test_they_are_scored_as_they_were_drawn_a_word_by_the_chance_of_any(
    model: VisMemModel, rollouts: list[Rollout]
) -> None:
    samples = tiny.samples()
    rows = torch.arange(len(rollouts)) // GROUP
    scores = score(model, prefill(model, samples), rollouts, rows, Learned(best_words=True))
    for rollout, logprobs, sampled in zip(rollouts, scores.logprobs, scores.mask, strict=True):
        drawn = [logprob for logprob, loss in zip(rollout.logprobs, rollout.loss_mask, strict=True) if loss]
        assert logprobs[sampled].tolist() == pytest.approx(drawn, abs=1e-4)
    barred = score(model, prefill(model, samples), rollouts, rows, Off(best_words=True))  # no memory may come
    words = barred.mask & torch.isfinite(barred.logprobs)
    assert barred.logprobs[words].abs().max() < 1e-5
    assert barred.entropy[barred.mask].abs().max() < 1e-5


def test_the_same_memories_at_the_same_places_give_the_same_answers(
    model: VisMemModel, rollouts: list[Rollout]
) -> None:
    recorded = {
        row_key(rollout.sample_id, row % GROUP): decisions_of(model, rollout) for row, rollout in enumerate(rollouts)
    }
    again = generate(model, tiny.samples(), Replay(recorded=recorded, best_words=True), **DRAWN)
    assert [rollout.token_ids for rollout in again] == [rollout.token_ids for rollout in rollouts]


@pytest.mark.usefixtures("scores_differ")
def test_stage2_scores_its_rollouts_as_it_drew_them(tiny_base: Path) -> None:
    objective, _ = tiny_stages.objective_of("stage2", tiny_base, best_words=True)
    metrics = objective.backward(objective.collect(0))
    assert metrics["update_kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < metrics["entropy"] < 1.1  # of none, short and long: log 3 at most
