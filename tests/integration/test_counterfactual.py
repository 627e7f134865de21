"""tau_rev (Eq. 14) is a counterfactual: a recorded answer decoded again differs by its memories' kinds alone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import Tensor

from vismem.config import GrpoConfig, Stage2Config
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Learned, Off, Replay, row_key
from vismem.generation.prompts import encode
from vismem.generation.replay import answer_states, decisions_of, prefill
from vismem.generation.types import Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.memory import FormationInputs
from vismem.models.vismem import VisMemModel
from vismem.training.grpo import negative_penalty
from vismem.training.rewards import rewards_of
from vismem.training.stage2 import Invocation

LIMITS = (1, 2, 3, 8)
SEEDS = (0, 1, 2)
GROUP = 4
TOKENS = 14


@pytest.fixture(scope="module")
def eager(tiny_base: Path) -> VisMemModel:
    """A model that likes each kind best at one place in four, with no limit of its own that matters here."""
    model = tiny.vismem(tiny_base, limit=max(LIMITS))
    with torch.no_grad():
        model.tokens.head.copy_(torch.randn(model.tokens.head.shape, generator=torch.Generator().manual_seed(2)))
        plain = generate(model, tiny.samples(), Off(), max_new_tokens=TOKENS)
        states = answer_states(model, prefill(model, tiny.samples()), plain, torch.arange(len(plain)))
        words, invokes = model.logit_parts(states.flatten(0, 1))
        model.tokens.bias.copy_((words.amax(1, keepdim=True) - invokes).quantile(1 / 4, dim=0))
    return model.requires_grad_(False)


def answers(model: VisMemModel, policy: InvocationPolicy, temperature: float, seed: int) -> list[Rollout]:
    return generate(
        model, tiny.samples(), policy, max_new_tokens=TOKENS, temperature=temperature, seed=seed, group_size=GROUP
    )


def recorded(model: VisMemModel, rollouts: list[Rollout]) -> dict[str, Any]:
    return {row_key(r.sample_id, i % GROUP): decisions_of(model, r) for i, r in enumerate(rollouts)}


RUNS = [(limit, seed, 1.0) for limit in LIMITS for seed in SEEDS] + [(limit, 0, 0.0) for limit in LIMITS]


@pytest.mark.parametrize(("limit", "seed", "temperature"), RUNS)
def test_a_replay_is_the_recorded_answer_and_a_swapped_one_is_until_its_first_memory(
    eager: VisMemModel, limit: int, seed: int, temperature: float
) -> None:
    learned = answers(eager, Learned(limit=limit), temperature, seed)
    places = recorded(eager, learned)
    assert max(map(len, places.values())) == limit if limit < 8 else max(map(len, places.values())) > 4
    again = answers(eager, Replay(limit=limit, recorded=places), temperature, seed)
    for ours, theirs in zip(learned, again, strict=True):
        assert theirs.token_ids == ours.token_ids
        assert [(i.position, i.kind) for i in theirs.invocations] == [(i.position, i.kind) for i in ours.invocations]
        words = [place for place, sampled in enumerate(theirs.loss_mask) if sampled]
        assert [theirs.logprobs[place] for place in words] == pytest.approx(
            [ours.logprobs[place] for place in words], abs=1e-4
        )
    swapped = answers(eager, Replay(limit=limit, recorded=places, swap=True), temperature, seed)
    for ours, theirs in zip(learned, swapped, strict=True):
        first = min((i.position for i in ours.invocations), default=len(ours.token_ids))
        assert theirs.token_ids[:first] == ours.token_ids[:first]
        kinds = [i.kind.other for i in ours.invocations]
        assert [i.kind for i in theirs.invocations] == kinds[: len(theirs.invocations)]
        decided = [place for place, _ in decisions_of(eager, ours)]
        assert [place for place, _ in decisions_of(eager, theirs)] == decided[: len(theirs.invocations)]
        assert theirs.finished or len(theirs.invocations) == len(kinds), "missing only behind the end of the answer"


def test_a_greedy_replay_of_no_memory_is_the_answer_without_memory(eager: VisMemModel) -> None:
    assert any(r.invocations for r in answers(eager, Learned(), 0.0, 0))
    plain, declined = (answers(eager, policy, 0.0, 0) for policy in (Off(), Replay(recorded={})))
    assert [r.token_ids for r in declined] == [r.token_ids for r in plain]


def test_words_in_the_place_of_declined_memories_are_drawn_as_among_words_alone(tiny_base: Path) -> None:
    """One uniform number serves twice: rescaled, it is as good as a fresh one."""
    model, sample, draws = tiny.vismem(tiny_base), tiny.samples()[:1], 4000
    with torch.no_grad():
        last = prefill(model, sample).last
        model.tokens.head.zero_()
        model.tokens.bias.fill_(float(model.logit_parts(last)[0].logsumexp(-1)))  # two of three draws are declined
        expected = model.logit_parts(last)[0].softmax(-1)[0] * draws
    rollouts = generate(model, sample, Replay(recorded={}), max_new_tokens=1, temperature=1.0, group_size=draws)
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts]), minlength=model.vocabulary)
    often = expected > 5
    assert often.sum() > 20
    chi_square = ((counts - expected)[often].pow(2) / expected[often]).mean()
    assert float(chi_square) == pytest.approx(1.0, abs=0.6)


def test_the_type_of_memories_that_are_the_same_is_never_punished(
    tiny_base: Path, eager: VisMemModel, monkeypatch: pytest.MonkeyPatch, scores_differ: None
) -> None:
    """p_type is exactly 0 then: it holds no noise of sampling."""
    model = tiny.vismem(tiny_base, tiny.MEMORY.model_copy(update={"long_length": tiny.MEMORY.short_length}))
    form = model.form

    def short(kind: MemoryKind, inputs: FormationInputs) -> Tensor:
        patches = inputs.patches or model.short_stream(encode(model.backbone, tiny.samples()).vision)
        return form(MemoryKind.SHORT, dataclasses.replace(inputs, patches=patches))

    with torch.no_grad():
        model.tokens.load_state_dict(eager.tokens.state_dict())
        for rows in (model.tokens.invoke, model.tokens.end):
            rows[1] = rows[0]
    monkeypatch.setattr(model, "form", short)
    grpo, stage = GrpoConfig(max_new_tokens=TOKENS), Stage2Config(group_size=GROUP, penalty=0.3)
    objective = Invocation(model, tiny.samples(), grpo, stage, 0, Accelerator(cpu=True))
    rollouts = objective.sample(tiny.samples(), objective.policy(0), 0)
    assert max(len(r.invocations) for r in rollouts) == 3
    rewards = rewards_of(tiny.samples(), rollouts)
    assert 0 < float(rewards.mean()) < 1
    paid = objective.shaped(rewards, tiny.samples(), rollouts, 0)
    assert torch.equal(paid, rewards - 0.3 * negative_penalty(rewards))
