"""A policy's LoRA on the vision encoder too: what it reaches on every family, and what it leaves alone."""

from pathlib import Path

import pytest
import tiny
import tiny_families
import torch
from accelerate import Accelerator
from torch import Tensor

from vismem.config import GrpoConfig, GrpoStageConfig
from vismem.generation.invocation import Off
from vismem.generation.prompts import encode
from vismem.generation.replay import prefill, score
from vismem.models.kinds import MemoryKind
from vismem.models.lora import LoraSettings
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel
from vismem.training.baselines import PolicyGrpo
from vismem.training.run import POLICY_LORA, trainable
from vismem.training.supervised import Supervised, plain_answer

PIXELS = {"qwen2_5_vl": 784, "internvl": 1, "llava_onevision": 1}  # coarse: as few tokens as there can be
pytestmark = pytest.mark.usefixtures("scores_differ")


@pytest.fixture(scope="module", params=tiny_families.VARIANTS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.save_base(tmp_path_factory.mktemp(request.param) / "base", request.param)


def adapted(base: Path, spread: float = 0.3) -> VisMemModel:
    model = tiny.vismem(base)
    torch.manual_seed(0)
    model.set_policy_lora(LoraSettings(4, 8.0, 0.0, vision=True))
    model.policy_lora.enabled = True
    move(model, spread)
    return model


@torch.no_grad()
def move(model: VisMemModel, spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for up in model.policy_lora.up.values():
        up.copy_(torch.randn(up.shape, generator=generator) * spread)


def features(model: VisMemModel) -> Tensor:
    prompt = encode(model.backbone, tiny_families.samples()[:2])
    return prompt.embeds[prompt.visual]


def test_it_stands_on_both_encoder_and_language_model(base: Path) -> None:
    model = adapted(base)
    both = len(model.backbone.language_targets()) + len(model.backbone.vision_targets())
    assert len(model.policy_lora.up) == both, "no name of one is a name of the other"


@pytest.mark.parametrize("coarse", [False, True])
def test_it_changes_what_the_prompt_shows_and_off_nothing(coarse: bool, base: Path) -> None:
    model, plain = adapted(base), tiny.vismem(base)
    if coarse:
        model.backbone.prompt_pixels = plain.backbone.prompt_pixels = PIXELS[model.backbone.family]
    assert features(model).shape == features(plain).shape
    assert not torch.allclose(features(model), features(plain), atol=1e-3)
    with model.policy_lora.active(False):
        assert torch.equal(features(model), features(plain))


def test_every_matrix_of_it_gets_a_gradient_and_nothing_else_does(base: Path) -> None:
    model = adapted(base)
    trained = trainable(model, POLICY_LORA)
    objective = Supervised(model, tiny_families.samples(), plain_answer, 0, Accelerator(cpu=True), 2, 2)
    objective.prompts_need_gradient = True
    objective.backward(objective.collect(0))
    assert [name for name, weight in trained.items() if weight.grad is None or not weight.grad.any()] == []
    assert [name for name, weight in model.backbone.model.named_parameters() if weight.grad is not None] == []


def test_the_gradient_through_the_encoder_is_the_loss_s(base: Path) -> None:
    """By central differences along it, in the encoder's part alone."""
    model = adapted(base)
    trainable(model, ("policy_lora.down.vision", "policy_lora.up.vision"))
    objective = Supervised(model, tiny_families.samples(), plain_answer, 0, Accelerator(cpu=True), 2, 2)
    objective.prompts_need_gradient = True
    batch = objective.collect(0)
    objective.backward(batch)
    slopes = {weight: weight.grad.clone() for weight in model.parameters() if weight.grad is not None}
    size = float(sum(slope.pow(2).sum() for slope in slopes.values())) ** 0.5
    losses = []
    for way in (1e-2, -2e-2):
        with torch.no_grad():
            for weight, slope in slopes.items():
                weight += way / size * slope
        losses.append(objective.backward(batch)["loss"])
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_off_while_memories_are_formed_and_in_their_gradient(
    kind: MemoryKind, checkpointing: bool, base: Path
) -> None:
    model = adapted(base)
    trained = trainable(model, ("short.", "long."))
    samples = tiny_families.samples()[:2]
    with torch.no_grad(), model.policy_lora.active(False):
        context = prefill(model, samples)  # what is read of the prompts: the same in both
    segment = context.last[:, None], torch.ones(2, 1, dtype=torch.bool)
    stream = context.prompt.embeds, context.prompt.positions, context.prompt.mask
    found = []
    for on in (False, True):
        context.patches = context.prefix = None
        for weight in trained.values():
            weight.grad = None
        with model.policy_lora.active(on), model.checkpointed(checkpointing):
            memory = context.form(kind, torch.arange(2), segment, stream)
            memory.float().pow(2).sum().backward()
        gradients = [weight.grad.flatten() for weight in trained.values() if weight.grad is not None]
        found.append((memory.detach(), torch.cat(gradients)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].any()
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)


def test_the_reference_of_grpo_sees_the_base_s_image_features(base: Path) -> None:
    model = adapted(base, spread=0.0)
    samples, rows = tiny_families.samples()[:2], torch.arange(2)
    objective = PolicyGrpo(model, samples, GrpoConfig(), GrpoStageConfig(), 0, Accelerator(cpu=True))
    objective.prompts_need_gradient = True
    move(model, 0.3)
    answers = [plain_answer(model, sample) for sample in samples]
    plain = tiny.vismem(base)
    with torch.no_grad():
        reference = objective.reference(Off(), prefill(model, samples), answers, rows)
        expected = score(plain, prefill(plain, samples), answers, rows)
        own = score(model, prefill(model, samples), answers, rows)
    torch.testing.assert_close(reference.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(own.logprobs, expected.logprobs, atol=1e-3)


def test_its_first_update_has_ratio_one_and_micro_batches_of_one_prompt_add_up(base: Path) -> None:
    """So answers are sampled, and scored again, with the adapter on in the encoder; its reference is not."""
    gradients = []
    for micro in (4, 64):
        model = adapted(base, spread=0.0)
        trained = trainable(model, POLICY_LORA)
        settings = GrpoConfig(batch_size=2, max_new_tokens=8, micro_batch=micro)
        objective = PolicyGrpo(
            model, tiny_families.samples()[:4], settings, GrpoStageConfig(group_size=4), 0, Accelerator(cpu=True)
        )
        objective.prompts_need_gradient = True
        move(model, 0.3)
        metrics = objective.backward(objective.collect(0))
        assert metrics["update_kl"] == pytest.approx(0, abs=1e-8)
        assert metrics["kl"] > 1e-4
        gradients.append({name: weight.grad for name, weight in trained.items() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == trained.keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=name)
