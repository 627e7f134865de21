"""The warm start's answers: reference answers with short and long memories at their start and after delimiters."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from vismem.data.sample import Sample
from vismem.generation.replay import without_memory
from vismem.generation.types import LATENT, Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.vismem import VisMemModel
from vismem.training.supervised import answer_with_memory, plain_answer

SEEDS = range(200)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    return tiny.vismem(tiny_base, limit=3)


@pytest.fixture(scope="module")
def sample(model: VisMemModel) -> Sample:
    """One with more places than the limit."""
    found = max(tiny.samples(), key=lambda sample: len(places(model, sample)))
    assert len(places(model, found)) > model.invocation_config.max_per_answer
    return found


def places(model: VisMemModel, sample: Sample) -> list[int]:
    """The indices of the words before which a memory may come: the first, and those after a delimiter."""
    words = plain_answer(model, sample).token_ids
    return [at for at in range(len(words)) if at == 0 or words[at - 1] in model.delimiter_ids]


def chosen(model: VisMemModel, written: Rollout) -> Iterator[int]:
    """The indices of the words before which memories come."""
    for invocation in written.invocations:
        yield sum(written.loss_mask[: invocation.position])


def test_without_its_memories_an_answer_is_the_reference(model: VisMemModel) -> None:
    for sample in tiny.samples():
        written, plain = answer_with_memory(model, sample, 3, 0.4), plain_answer(model, sample)
        bare = without_memory(written)
        assert (bare.token_ids, bare.loss_mask, bare.logprobs) == (plain.token_ids, plain.loss_mask, plain.logprobs)
        for invocation in written.invocations:
            length = model.length_of(invocation.kind)
            memory = (model.invoke_ids[invocation.kind], *[LATENT] * length, model.end_ids[invocation.kind])
            stop = invocation.position + len(memory)
            assert written.token_ids[invocation.position : stop] == memory
            assert written.loss_mask[invocation.position : stop] == (False,) * len(memory)
            assert invocation.forced


def test_memories_come_at_the_start_and_after_delimiters_and_are_as_often_short_as_long(
    model: VisMemModel, sample: Sample
) -> None:
    written = [answer_with_memory(model, sample, seed, 0.4) for seed in SEEDS]
    assert {at for each in written for at in chosen(model, each)} == set(places(model, sample))
    kinds = [invocation.kind for each in written for invocation in each.invocations]
    assert kinds.count(MemoryKind.SHORT) / len(kinds) == pytest.approx(0.5, abs=0.08)
    assert any(len({i.kind for i in each.invocations}) == 2 for each in written), "kinds are drawn one by one"


def test_an_answer_has_at_least_one_memory_and_at_most_the_models_limit(model: VisMemModel, sample: Sample) -> None:
    for probability, most in ((0.0, 1), (0.4, 3), (1.0, 3)):
        counts = [len(answer_with_memory(model, sample, seed, probability).invocations) for seed in SEEDS]
        assert (min(counts), max(counts)) == (1 if probability < 1 else 3, most)


def test_a_model_that_may_have_none_has_none(
    model: VisMemModel, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = model.invocation_config.model_copy(update={"max_per_answer": 0})
    monkeypatch.setattr(model, "invocation_config", none)
    assert all(answer_with_memory(model, sample, seed, 0.4).invocations == () for seed in SEEDS)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_of_too_few_or_too_many_places_each_is_as_likely(
    probability: float, model: VisMemModel, sample: Sample
) -> None:
    among = places(model, sample)
    written = [answer_with_memory(model, sample, seed, probability) for seed in SEEDS]
    found = [at for each in written for at in chosen(model, each)]
    expected = len(found) / len(among)
    for place in among:
        assert found.count(place) == pytest.approx(expected, abs=4 * expected**0.5), place


def test_each_place_has_the_chosen_chance(model: VisMemModel, tiny_base: Path, sample: Sample) -> None:
    unlimited = tiny.vismem(tiny_base, limit=100)
    among, counts = places(model, sample), 0
    for seed in SEEDS:
        counts += len(answer_with_memory(unlimited, sample, seed, 0.4).invocations)
    none = 0.6 ** len(among)  # then one place is drawn
    assert counts / len(SEEDS) == pytest.approx(0.4 * len(among) + none, rel=0.1)


def test_memories_depend_on_the_seed_and_the_sample_alone(model: VisMemModel) -> None:
    first, second = tiny.samples()[:2]
    assert answer_with_memory(model, first, 5, 0.4) == answer_with_memory(model, first, 5, 0.4)
    drawn = [answer_with_memory(model, first, seed, 0.4).invocations for seed in range(8)]
    assert len(set(drawn)) > 3
    answer_with_memory(model, second, 5, 0.4)
    assert answer_with_memory(model, first, 5, 0.4).invocations == drawn[5]
