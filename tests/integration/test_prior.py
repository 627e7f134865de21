"""Before stage II trains, a memory comes with the chosen chances, at the start and after delimiters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from vismem.config import InvocationConfig, Stage2Config
from vismem.generation.engine import generate
from vismem.generation.invocation import Learned
from vismem.generation.replay import answer_states, prefill
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel
from vismem.training.stage2 import ANSWERED, decisions, fit_invocation

TOKENS = 24
LETTERS = InvocationConfig(delimiters=(*"abcdefghijklmnopqrstuvwxyz", ",", "."), max_per_answer=3)  # some are spoken


@torch.no_grad()
def chances(
    base: Path, temperature: float = 1.0, together: int = 32, **changes: Any
) -> Mapping[str, tuple[float, float]]:
    """The mean chance of a short and of a long memory at each sort of place in answers of the fitted model."""
    model, samples = VisMemModel(load_base(base), tiny.MEMORY, LETTERS), tiny.samples(48)
    answers = generate(model, samples, ANSWERED, max_new_tokens=TOKENS, temperature=temperature)
    with torch.enable_grad():
        decided = decisions(model, samples, answers, together)
        fit_invocation(model, *decided, Stage2Config(**changes), temperature)
    rollouts = generate(model, samples, Learned(), max_new_tokens=TOKENS, temperature=temperature, seed=9)
    hidden = answer_states(model, prefill(model, samples), rollouts, torch.arange(len(samples)))
    found: dict[str, list[torch.Tensor]] = {"start": [], "delimiter": [], "elsewhere": []}
    for states, rollout in zip(hidden, rollouts, strict=True):
        for index, sampled in enumerate(rollout.loss_mask):
            if sampled:
                after = index > 0 and rollout.token_ids[index - 1] in model.delimiter_ids
                sort = "delimiter" if after else "elsewhere" if index else "start"
                found[sort].append((model.logits(states[index]) / temperature).softmax(-1)[model.vocabulary :])
    assert min(map(len, found.values())) >= 48
    means = {sort: torch.stack(rows).mean(0).tolist() for sort, rows in found.items()}
    return {sort: (short, long) for sort, (short, long) in means.items()}


def test_the_prior_is_flat_and_the_same_for_both_kinds(tiny_base: Path) -> None:
    found = chances(tiny_base, start_probability=0.2, delimiter_probability=0.2)
    for place in ("start", "delimiter"):
        assert sum(found[place]) == pytest.approx(0.2, abs=0.08), place
    for short, long in found.values():
        assert short == pytest.approx(long, rel=1e-5)
    assert sum(found["elsewhere"]) < sum(found["delimiter"])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.5])
def test_each_chance_is_that_of_its_own_setting_at_the_rollouts_temperature(
    tiny_base: Path, temperature: float
) -> None:
    found = chances(tiny_base, temperature, start_probability=0.6, delimiter_probability=0.1)
    assert sum(found["start"]) == pytest.approx(0.6, abs=0.15)
    assert sum(found["delimiter"]) == pytest.approx(0.1, abs=0.06)


def test_small_batches_fit_what_large_ones_do(tiny_base: Path) -> None:
    large, small = (chances(tiny_base, together=count, start_probability=0.3) for count in (64, 5))
    for place, found in large.items():
        assert small[place] == pytest.approx(found, rel=1e-3)


def test_the_answers_that_it_is_fitted_on_have_the_models_own_limit(tiny_base: Path) -> None:
    for limit in (1, 3):
        invocation = LETTERS.model_copy(update={"max_per_answer": limit})
        model = VisMemModel(load_base(tiny_base), tiny.MEMORY, invocation)
        answers = generate(model, tiny.samples(), ANSWERED, max_new_tokens=TOKENS, temperature=1.0)
        assert max(len(answer.invocations) for answer in answers) == limit
