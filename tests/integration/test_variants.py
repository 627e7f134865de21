"""The memories that VisMem's are compared with: what they are made of, and what they leave alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from replayed import recorded

from vismem.config import InvocationConfig
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.evaluation.arms import ARMS
from vismem.files import read_json, write_json
from vismem.generation.engine import generate
from vismem.generation.invocation import Random
from vismem.generation.prompts import encode
from vismem.generation.replay import prefill, score
from vismem.generation.types import LATENT
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base
from vismem.models.variants import Continuous, StaticPrefix, load_variant
from vismem.models.vismem import VisMemModel
from vismem.training.baselines import answer_behind_memory

KINDS = (StaticPrefix, Continuous)


def memories(model: VisMemModel, samples: list[Sample]) -> torch.Tensor:
    """(R, N, d): the memory at each reference answer's start, one sample at a time."""
    with tiny.formed(model) as found:
        for sample in samples:
            score(model, prefill(model, [sample]), [answer_behind_memory(model, sample)], torch.tensor([0]))
    return torch.cat(found).detach()


def asked_otherwise() -> tuple[Sample, Sample, Sample]:
    """Two questions about one image, and the first one about another image."""
    first, other = [sample for sample in tiny.samples() if len(sample.images) == 1][:2]
    assert first.images != other.images
    return first, replace(first, question=f"{other.question} And where is it?"), replace(first, images=other.images)


def test_a_continuous_memory_is_the_same_for_two_questions_about_one_image_and_another_for_another(
    tiny_base: Path,
) -> None:
    first, otherwise, elsewhere = asked_otherwise()
    samples = [first, otherwise, replace(first, question=""), elsewhere]
    memory, *same, another = memories(tiny.vismem(tiny_base, kind=Continuous), samples)
    for one in same:
        torch.testing.assert_close(one, memory, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(another, memory, atol=1e-2)
    vismem, asked = memories(tiny.vismem(tiny_base), samples[:2])
    assert not torch.allclose(vismem, asked, atol=1e-4), "VisMem's own memory depends on the question"


def test_a_continuous_memory_s_queries_read_the_visual_hidden_states_alone(tiny_base: Path) -> None:
    """All of them, in a batch with more and with fewer images too."""
    model = tiny.vismem(tiny_base, kind=Continuous)
    seen = []
    model.builder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    samples = tiny.samples()[:6]
    assert {len(sample.images) for sample in samples} == {1, 2}
    context = prefill(model, samples)
    answers = [answer_behind_memory(model, sample) for sample in samples]
    score(model, context, answers, torch.arange(6))
    ((state, mask),) = seen
    order = sorted(range(6), key=lambda row: len(answers[row].token_ids))  # in which they are scored
    assert torch.equal(mask, context.visual_mask[order])
    assert torch.equal(state[mask], context.visual[order][mask])


def test_a_static_prefix_is_its_vectors_whatever_is_shown_and_asked(tiny_base: Path) -> None:
    model = tiny.vismem(tiny_base, kind=StaticPrefix)
    assert len(model.prefix) == tiny.MEMORY.short_length + tiny.MEMORY.long_length
    assert torch.equal(memories(model, [*asked_otherwise()]), model.prefix.detach().expand(3, -1, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_begins_with_the_memory_and_has_no_other(kind: type[VisMemModel], tiny_base: Path) -> None:
    model, short = tiny.vismem(tiny_base, kind=kind), MemoryKind.SHORT
    memory = (model.invoke_ids[short], *[LATENT] * model.length_of(short), model.end_ids[short])
    for rollout in generate(model, tiny.samples()[:4], ARMS[kind.variant].policy, max_new_tokens=20):
        assert rollout.token_ids[: len(memory)] == memory
        assert [invocation.position for invocation in rollout.invocations] == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_is_not_loaded_as_vismem(kind: type[VisMemModel], tiny_base: Path, tmp_path: Path) -> None:
    tiny.vismem(tiny_base, kind=kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=kind.variant):
        VisMemModel.from_pretrained(tmp_path, tiny_base)


@pytest.mark.parametrize("kind", [VisMemModel, *KINDS])
def test_each_variant_comes_back_as_itself(kind: type[VisMemModel], tiny_base: Path, tmp_path: Path) -> None:
    model = tiny.vismem(tiny_base, kind=kind)
    model.save_pretrained(tmp_path)
    again = load_variant(tmp_path, tiny_base)
    assert type(again) is kind
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert again.backbone.embedding.weight.dtype == torch.float32
    assert load_variant(tmp_path, str(tiny_base), "bfloat16").backbone.embedding.weight.dtype == torch.bfloat16


def test_a_folder_without_the_variant_s_name_is_vismem_and_an_unknown_name_is_refused(
    tiny_base: Path, tmp_path: Path
) -> None:
    tiny.vismem(tiny_base).save_pretrained(tmp_path)
    file = tmp_path / "vismem.json"
    settings = read_json(file)
    del settings["variant"]
    write_json(file, settings)
    assert type(load_variant(tmp_path, tiny_base)) is VisMemModel
    write_json(file, settings | {"variant": "other"})
    with pytest.raises(UserError) as refused:
        load_variant(tmp_path, tiny_base)
    assert str(refused.value) == f"{file}: unknown variant 'other'; there are vismem, static_prefix, continuous"
    file.unlink()
    with pytest.raises(UserError, match=r"give a folder that a training wrote$"):
        load_variant(tmp_path, tiny_base)


def test_a_static_prefix_starts_at_the_embeddings_scale_and_its_seed_alone_decides_it(tiny_base: Path) -> None:
    backbone = load_base(tiny_base)
    memory = tiny.MEMORY.model_copy(update={"short_length": 40, "long_length": 60})
    first, again, other = (StaticPrefix(backbone, memory, InvocationConfig(), seed).prefix for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    default, zero = (StaticPrefix(backbone, memory, InvocationConfig(), *seed).prefix for seed in ((), (0,)))
    assert torch.equal(default, zero)
    scale = backbone.embedding.weight.square().mean().sqrt()
    assert float((first.square().mean().sqrt() / scale).detach()) == pytest.approx(1, rel=0.1)
    assert first.dtype == torch.float32
    model = StaticPrefix(backbone, memory, InvocationConfig(max_per_answer=2), 3)
    assert (model.memory_config, model.limit(None)) == (memory, 2)
    expected = VisMemModel(backbone, memory, InvocationConfig(), 3).state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.items()), "the rest as VisMem"


def test_a_static_prefix_is_inserted_in_the_base_s_type_and_reads_no_image(tiny_base: Path) -> None:
    model = StaticPrefix(load_base(tiny_base, "bfloat16"), tiny.MEMORY, InvocationConfig())
    prompt = encode(model.backbone, tiny.samples()[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.backbone, "patch_stream", None)
        policy, samples = ARMS["static_prefix"].policy, tiny.samples()[:2]
        _, ((_, _, formed),) = recorded(
            model, lambda: generate(model, samples, policy, max_new_tokens=2, prompt=prompt)
        )
        stream = model.short_stream(prompt.vision)
    assert formed.dtype == torch.bfloat16
    assert torch.equal(formed, model.prefix.to(torch.bfloat16).expand(2, -1, -1))
    assert stream.vision is prompt.vision


def test_a_continuous_memory_is_a_short_one(tiny_base: Path) -> None:
    model = tiny.vismem(tiny_base, kind=Continuous)
    policy = Random(probability=1.0, kinds=(MemoryKind.LONG,), limit=1)
    with pytest.raises(AssertionError, match=r"^a long memory reads the question$"):
        generate(model, tiny.samples()[:1], policy, max_new_tokens=2)
