"""What is kept of prefilled prompts for the memories that are formed on them."""

from pathlib import Path

import pytest
import tiny
import torch
from replayed import recorded

from vismem.generation.engine import generate
from vismem.generation.invocation import Random
from vismem.generation.replay import prefill
from vismem.models.kinds import MemoryKind
from vismem.models.memory import causal_mask
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    return tiny.vismem(tiny_base).requires_grad_(False)


def test_each_prompt_s_states_are_those_at_its_visual_tokens_in_order_and_at_its_last_token(
    model: VisMemModel,
) -> None:
    context, lengths = prefill(model, tiny.samples()), set()
    prompt = context.prompt
    hidden = model.backbone.language(prompt.embeds, prompt.positions, causal_mask(prompt.mask))
    for row, states in enumerate(hidden):
        seen = states[prompt.visual[row]]
        lengths.add(len(seen))
        assert context.visual_mask[row].tolist() == [True] * len(seen) + [False] * (context.visual.shape[1] - len(seen))
        torch.testing.assert_close(context.visual[row, : len(seen)], seen)
        torch.testing.assert_close(context.last[row], states[prompt.mask[row]][-1])
    assert len(lengths) > 1
    assert context.visual.shape[1] == max(lengths), "no more padding than the longest has"


@pytest.mark.parametrize("kind", MemoryKind)
def test_what_a_kind_reads_of_the_prompts_is_computed_once_and_nothing_for_the_other_kind(
    model: VisMemModel, kind: MemoryKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, list[object]] = {"short_stream": [], "long_prefix": []}
    for name, found in made.items():
        own = getattr(model, name)
        monkeypatch.setattr(model, name, lambda read, own=own, found=found: found.append(own(read)) or found[-1])
    policy = Random(probability=1.0, anywhere=1.0, kinds=(kind,))
    _, formed = recorded(model, lambda: generate(model, tiny.samples()[:4], policy, max_new_tokens=4))
    assert len(formed) > 1
    assert {name: len(found) for name, found in made.items()} == {
        "short_stream": kind is MemoryKind.SHORT,
        "long_prefix": kind is MemoryKind.LONG,
    }
    (read,) = made["short_stream"] + made["long_prefix"]
    for _, inputs, _ in formed:
        assert [inputs.patches, inputs.prefix][KINDS.index(kind)] is read
        assert [inputs.prefix, inputs.patches][KINDS.index(kind)] is None


def test_the_prompts_images_are_projected_once_and_each_short_memory_alone(
    model: VisMemModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, own = list[int](), model.backbone.project
    monkeypatch.setattr(model.backbone, "project", lambda hidden: rows.append(len(hidden)) or own(hidden))
    policy = Random(probability=0.5, anywhere=1.0, kinds=(MemoryKind.SHORT,))
    samples = tiny.samples()[:4]
    _, formed = recorded(model, lambda: generate(model, samples, policy, max_new_tokens=6))
    _, stream, *memories = rows  # the first is the coarse prompts'
    assert stream == len(samples)
    assert memories == [len(inputs.sample) for _, inputs, _ in formed]
    assert min(memories) < len(samples)
