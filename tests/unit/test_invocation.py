"""Invocation policies by themselves: what they decide depends on the row's name and place, and on nothing else."""

import dataclasses

import numpy as np
import pytest
import torch

from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.generation.controls import Noise, OfKind, Relook, Shuffled, Swapped
from vismem.generation.invocation import NONE, InvocationPolicy, Learned, Off, Random, Replay, StepView, row_key
from vismem.models.kinds import MemoryKind

SHORT, LONG = 0, 1
ROWS = 4000


def view(rows: int, *, decision: int = 3, at_delimiter: bool = True) -> StepView:
    return StepView(
        tuple(row_key(f"s{row}", 0) for row in range(rows)),
        np.full(rows, decision),
        np.full(rows, at_delimiter),
    )


def share(policy: InvocationPolicy, at: StepView) -> float:
    return float((policy.force(at, seed=0) != NONE).mean())


def test_at_one_hundred_percent_a_memory_comes_at_every_delimiter_and_nowhere_else() -> None:
    assert share(Random(probability=1.0), view(50)) == 1
    assert share(Random(probability=1.0), view(50, at_delimiter=False)) == 0


def test_the_start_counts_as_a_delimiter() -> None:
    start = view(50, decision=0)
    assert share(Random(probability=1.0), start) == 1


@pytest.mark.parametrize("percent", [25, 50, 75])
def test_a_random_memory_comes_with_its_probability_and_either_kind_as_often(percent: int) -> None:
    choice = Random(probability=percent / 100).force(view(ROWS), seed=0)
    assert (choice != NONE).mean() == pytest.approx(percent / 100, abs=0.03)
    assert (choice[choice != NONE] == LONG).mean() == pytest.approx(0.5, abs=0.04)


def test_anywhere_is_relative_to_the_probability_at_delimiters() -> None:
    between = view(ROWS, at_delimiter=False)
    assert share(Random(probability=0.5, anywhere=0.5), between) == pytest.approx(0.25, abs=0.03)
    assert share(Random(probability=1.0, anywhere=1.0), between) == 1


def test_random_of_one_kind_forces_that_kind() -> None:
    choice = Random(probability=1.0, kinds=(MemoryKind.LONG,)).force(view(50), seed=0)
    assert set(choice.tolist()) == {LONG}


def test_a_rows_draw_does_not_depend_on_the_rows_beside_it_but_on_seed_and_place() -> None:
    policy, together = Random(probability=0.5), view(40)
    choice = policy.force(together, seed=0)
    for row in range(40):
        alone = StepView(together.keys[row : row + 1], np.array([3]), np.array([True]))
        assert policy.force(alone, seed=0)[0] == choice[row]
    assert (policy.force(together, seed=1) != choice).any()
    assert (policy.force(view(40, decision=4), seed=0) != choice).any()


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        (Off(), ()),
        (Relook(), ()),
        (Random(), ()),
        (Learned(), (MemoryKind.SHORT, MemoryKind.LONG)),
        (Swapped(), (MemoryKind.SHORT, MemoryKind.LONG)),
        (OfKind(kind=MemoryKind.LONG), (MemoryKind.SHORT, MemoryKind.LONG)),
        (Learned(sampled=(MemoryKind.SHORT,)), (MemoryKind.SHORT,)),
        (Learned(sampled=(MemoryKind.LONG,)), (MemoryKind.LONG,)),
    ],
)
def test_the_model_may_sample_only_the_kinds_that_the_policy_leaves_to_it(
    policy: InvocationPolicy, kinds: tuple[MemoryKind, ...]
) -> None:
    assert policy.sampled == kinds
    assert policy.allowed(view(2)).tolist() == [[MemoryKind.SHORT in kinds, MemoryKind.LONG in kinds]] * 2


def test_a_replay_forces_what_was_recorded_or_the_other_kind_and_declines_all_else() -> None:
    recorded = {row_key("s0", 0): [(3, MemoryKind.SHORT)], row_key("s1", 0): [(4, MemoryKind.SHORT)]}
    assert Replay(recorded=recorded).force(view(2), seed=0).tolist() == [SHORT, NONE]
    assert Replay(recorded=recorded).force(view(3), seed=0).tolist() == [SHORT, NONE, NONE], "one was not recorded"
    assert Replay(recorded=recorded, swap=True).force(view(2), seed=0).tolist() == [LONG, NONE]
    assert Replay(recorded=recorded).allowed(view(1)).all()  # it samples from the same distribution as the recording
    assert Replay(recorded=recorded).declines
    assert not any(policy.declines for policy in (Off(), Random(), Learned(), Swapped(), Noise(), Shuffled()))


def test_a_control_of_kinds_changes_the_kind_that_was_asked_for() -> None:
    for kind in MemoryKind:
        assert Learned().invoked(kind) is kind
        assert Swapped().invoked(kind) is kind.other
        assert {OfKind(kind=kind).invoked(asked) for asked in MemoryKind} == {kind}


def test_noise_has_the_memorys_mean_and_spread_and_is_drawn_row_by_row() -> None:
    memory = 0.3 + 2 * torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    memory[1] *= 10
    noise = Noise().latents(memory, view(3), seed=0)
    torch.testing.assert_close(noise.mean((1, 2)), memory.mean((1, 2)))
    torch.testing.assert_close(noise.std((1, 2)), memory.std((1, 2)))
    unit = ((noise - noise.mean((1, 2), keepdim=True)) / noise.std((1, 2), keepdim=True)).flatten()
    assert float(unit.pow(4).mean()) == pytest.approx(3, abs=0.6), "Gaussian"
    assert float(torch.corrcoef(torch.stack([noise.flatten(), memory.flatten()]))[0, 1]) == pytest.approx(0, abs=0.15)
    last = StepView(view(3).keys[2:], np.array([3]), np.array([True]))
    torch.testing.assert_close(Noise().latents(memory[2:], last, seed=0), noise[2:])
    for seed, at in ((1, view(3)), (0, view(3, decision=4))):
        assert not torch.allclose(Noise().latents(memory, at, seed), noise)
    assert Noise().latents(memory.bfloat16(), view(3), seed=0).dtype == torch.bfloat16


def _sample(name: str, *images: bytes) -> Sample:
    return dataclasses.replace(_PLAIN, id=name, images=images)


_PLAIN = Sample(id="", images=(), question="?", answer="a")


def test_a_donor_is_the_next_sample_with_other_images_cyclically() -> None:
    samples = [_sample("a", b"1"), _sample("b", b"1"), _sample("c", b"2"), _sample("d", b"1")]
    assert Shuffled().donors(samples) == [2, 2, 3, 2]
    assert Shuffled().donors(samples[:2]) == [1, 0], "where all show the same, the next question"
    assert Learned().donors(samples) is None


def test_a_sample_alone_has_no_donor() -> None:
    with pytest.raises(UserError) as refused:
        Shuffled().donors([_sample("a", b"1")])
    assert str(refused.value) == (
        "shuffled memories come from another sample of the same call, and there is only one: "
        "decode at least two together (evaluate.batch_size, evaluate.limit)"
    )
