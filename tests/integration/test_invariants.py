"""The invariants that the design names, on every supported family where a family can matter.

Elsewhere: greedy text against Hugging Face's `generate` and image features in `test_backbones`, ONNX against torch in
`test_export`, the gradient through a memory in `test_engine`, killed and repeated runs in `test_resume`.
"""

import gc
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families as families
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from vismem.config import Config, GrpoConfig, Stage1Config, Stage2Config, WarmStartConfig
from vismem.data.sample import Sample
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Learned, Off, Random
from vismem.generation.prompts import encode
from vismem.generation.replay import prefill, score
from vismem.generation.types import LATENT, Rollout
from vismem.models import memory
from vismem.models.backbones.base import Backbone
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base
from vismem.models.memory import causal_mask
from vismem.models.vismem import VisMemModel
from vismem.training.run import FORMATION, INVOCATION, POLICY_LORA
from vismem.training.stage1 import stage1
from vismem.training.stage2 import Invocation, stage2

GRPO = GrpoConfig(batch_size=2, max_new_tokens=8, checkpoint_every=2)
STAGE: dict[str, Any] = {"group_size": 4, "learning_rate": 1e-2}
STAGE1 = Stage1Config(steps=3, warm_start=WarmStartConfig(steps=3, batch_size=4), **STAGE)
STAGE2 = Stage2Config(steps=4, policy_lora=True, **STAGE)
MEMORY = tiny.MEMORY.model_copy(update={"lora_dropout": 0.1})  # so that a draw that is not the step's own would show
CONFIG = Config(memory=MEMORY, grpo=GRPO, stage1=STAGE1, stage2=STAGE2)
RANDOM = Random(probability=0.7, anywhere=0.3)
pytestmark = pytest.mark.usefixtures("scores_differ")


@pytest.fixture(scope="module", params=families.VARIANTS)
def variant_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_base(tmp_path_factory.mktemp(request.param), request.param)


def eager_model(base: Path) -> VisMemModel:
    """A model that likes to invoke, with a policy adapter that would show if it were on."""
    model = tiny.vismem(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.tokens.head.copy_(0.1 * torch.randn(model.tokens.head.shape, generator=generator))
        last = prefill(model, families.samples()).last
        model.tokens.bias.fill_(float(model.backbone.head(last).logsumexp(-1).mean()) - 1.5)
        for name, parameter in model.policy_lora.named_parameters():
            if name.startswith("up."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model(variant_base: Path) -> VisMemModel:
    return eager_model(variant_base)


# --- one engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Learned(), RANDOM], ids=["learned", "random"])
def test_a_row_is_the_same_alone_and_beside_rows_that_invoke_at_other_times(
    model: VisMemModel, policy: InvocationPolicy
) -> None:
    samples = families.samples()
    together = generate(model, samples, policy, max_new_tokens=10, temperature=1.0, seed=4)
    places = {tuple(i.position for i in rollout.invocations) for rollout in together}
    assert len(places) >= 4, "rows should invoke at different times, and some should not"
    assert {i.kind for rollout in together for i in rollout.invocations} == set(MemoryKind)
    for sample, expected in zip(samples, together, strict=True):
        alone = generate(model, [sample], policy, max_new_tokens=10, temperature=1.0, seed=4)[0]
        assert (alone.token_ids, alone.invocations) == (expected.token_ids, expected.invocations)
        assert alone.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_cached_decoding_equals_one_full_pass_of_the_untouched_base_over_the_same_embeddings(
    model: VisMemModel, variant_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = load_base(variant_base)  # no adapter was ever hung into it
    formed: list[tuple[MemoryKind, Tensor]] = []
    form = model.form

    def recording(kind: MemoryKind, state: Any) -> Tensor:
        formed.append((kind, form(kind, state)))
        return formed[-1][1]

    monkeypatch.setattr(model, "form", recording)
    several = set()
    for sample in families.samples():
        formed.clear()
        rollout = generate(model, [sample], RANDOM, max_new_tokens=10, temperature=1.0, seed=1)[0]
        assert [kind for kind, _ in formed] == [i.kind for i in rollout.invocations]
        expected = full_pass(model, untouched, sample, rollout, [memory[0] for _, memory in formed])
        for sampled, ours, theirs in zip(rollout.loss_mask, rollout.logprobs, expected.tolist(), strict=True):
            assert not sampled or ours == pytest.approx(theirs, abs=1e-4)
        if len({kind for kind, _ in formed}) == 2:
            several.add(len(sample.images))
    assert {1, 2} <= several, "both kinds in one answer, about one image and about two"


def full_pass(model: VisMemModel, base: Backbone, sample: Sample, rollout: Rollout, memories: list[Tensor]) -> Tensor:
    """(T,) log-probabilities of an answer's tokens among the base's own, from one pass without a cache."""
    with torch.no_grad():
        prompt = encode(base, [sample])
        ids = torch.tensor(rollout.token_ids)
        answer = model.embed(ids.clamp_min(0))
        answer[ids == LATENT] = torch.cat([*memories, answer[:0]])
        length = prompt.embeds.shape[1]
        tail = prompt.next_position()[:, None] + torch.arange(len(ids))
        hidden = base.language(
            torch.cat([prompt.embeds, answer[None]], dim=1),
            torch.cat([prompt.positions, tail.expand(3, -1, -1)], dim=2),
            causal_mask(torch.ones(1, length + len(ids), dtype=torch.bool)),
        )
        logits = base.head(hidden[0, length - 1 : -1])
        barred = [token for token in model.memory_ids if token < logits.shape[-1]]
        logits[:, barred] = -torch.inf
        return logits.log_softmax(-1).gather(1, ids.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]


def test_greedy_text_before_the_first_invocation_is_that_of_the_model_without_memory(model: VisMemModel) -> None:
    late = Random(probability=0.15, anywhere=1.0)
    plain = generate(model, families.samples(), Off(), max_new_tokens=10)
    invoking = generate(model, families.samples(), late, max_new_tokens=10)
    starts = [r.invocations[0].position for r in invoking if r.invocations]
    assert max(starts) > 1
    for before, after in zip(plain, invoking, strict=True):
        first = after.invocations[0].position if after.invocations else len(after.token_ids)
        assert after.token_ids[:first] == before.token_ids[:first]


def states_of_the_base(backbone: Backbone) -> tuple[Tensor, ...]:
    """Everything that the base computes for a prompt: features in their places, patches, hidden states."""
    with torch.no_grad():
        prompt = encode(backbone, families.samples())
        hidden = backbone.language(prompt.embeds, prompt.positions, causal_mask(prompt.mask))
        return prompt.embeds, backbone.patch_stream(prompt.vision).features, hidden


def test_forming_memories_leaves_no_adapter_on_even_where_it_fails(
    model: VisMemModel, variant_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = states_of_the_base(load_base(variant_base))
    rollouts = generate(model, families.samples(), RANDOM, max_new_tokens=8, temperature=1.0)
    assert {i.kind for rollout in rollouts for i in rollout.invocations} == set(MemoryKind)
    faults = {MemoryKind.SHORT: (type(model.backbone), "memory_stream"), MemoryKind.LONG: (memory, "causal_mask")}
    for kind, place in faults.items():
        always = Random(probability=1.0, kinds=(kind,))
        with monkeypatch.context() as patch:
            patch.setattr(*place, None)  # what is called in the midst of a formation
            with pytest.raises(TypeError):
                generate(model, families.samples(), always, max_new_tokens=8)
    for before, after in zip(expected, states_of_the_base(model.backbone), strict=True):
        assert torch.equal(before, after)
    for lora in (model.short.lora, model.long.lora, model.policy_lora):
        with lora.active():
            states = states_of_the_base(model.backbone)
        assert any(not torch.equal(a, b) for a, b in zip(expected, states, strict=True)), "the adapters would show"


# --- what training may change ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(
    variant_base: Path, tmp_path_factory: pytest.TempPathFactory, scores_differ: None
) -> tuple[dict[str, Path], list[Backbone]]:
    """Both stages of a variant: the folders they wrote, and the bases that they held in memory at the end."""
    held: list[Backbone] = []

    def loading(*arguments: Any) -> Backbone:
        held.append(load_base(*arguments))
        return held[-1]

    inputs = {"base": variant_base, "validate": tiny.save_data(tmp_path_factory.mktemp("validate"), count=4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vismem.training.run.load_base", loading)
        patch.setattr("vismem.models.vismem.load_base", loading)
        for name, step in (("stage1", stage1), ("stage2", stage2)):
            inputs[name] = tmp_path_factory.mktemp(name)
            step(CONFIG, inputs, inputs[name])
    return inputs, held


def test_both_stages_leave_every_weight_of_the_base_bit_identical(
    stages: tuple[dict[str, Path], list[Backbone]], variant_base: Path
) -> None:
    fresh = load_base(variant_base).model.state_dict()
    assert len(stages[1]) == 2
    for backbone in stages[1]:
        after = backbone.model.state_dict()
        assert after.keys() == fresh.keys()
        assert [name for name in fresh if not torch.equal(fresh[name], after[name])] == []


def test_each_stage_changes_what_it_names_and_nothing_else(
    stages: tuple[dict[str, Path], list[Backbone]], variant_base: Path
) -> None:
    inputs = stages[0]
    fresh = VisMemModel(load_base(variant_base), CONFIG.memory, CONFIG.invocation, CONFIG.seed).state_dict()
    first, second = (
        load_file(inputs[name] / "memory.safetensors") | load_file(inputs[name] / "policy.safetensors")
        for name in ("stage1", "stage2")
    )
    assert first.keys() == second.keys() == fresh.keys()
    formation = {name for name in fresh if name.startswith(FORMATION)}
    reader = {name for name in fresh if name.startswith(POLICY_LORA)}
    assert {name for name in fresh if not torch.equal(fresh[name], first[name])} == formation | reader
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert {"tokens.head", "tokens.bias"} <= changed
    assert any(name.startswith(POLICY_LORA) for name in changed)
    assert all(name.startswith(INVOCATION + POLICY_LORA) for name in changed)
    memory = "memory.safetensors"
    assert (inputs["stage1"] / memory).read_bytes() == (inputs["stage2"] / memory).read_bytes()


def test_the_reference_policy_is_the_base_itself_and_no_second_copy(model: VisMemModel) -> None:
    """What is kept of stage II's start is its rows and its adapter; the base's weights are those that are there."""
    samples = families.samples()[:3]
    rollouts = generate(model, samples, RANDOM, max_new_tokens=8, temperature=1.0)
    assert any(rollout.invocations for rollout in rollouts)
    sample = torch.arange(3)
    with model.policy_lora.active():
        expected = score(model, prefill(model, samples), rollouts, sample)
    kind = type(model.backbone.model)

    def copies() -> int:
        return sum(isinstance(found, kind) for found in gc.get_objects())

    before = copies()
    with torch.no_grad(), model.policy_lora.active():
        objective = Invocation(model, samples, GRPO, STAGE2, 0, Accelerator(cpu=True))
        objective.prompts_need_gradient = True
        for up in model.policy_lora.up.values():
            up *= 2
        context = prefill(model, samples)
        reference = objective.reference(RANDOM, context, rollouts, sample)
        moved = score(model, context, rollouts, sample)
        assert copies() == before
        for up in model.policy_lora.up.values():
            up /= 2
    assert torch.equal(reference.logprobs, expected.logprobs)
    assert not torch.allclose(reference.logprobs, moved.logprobs, atol=1e-3)
