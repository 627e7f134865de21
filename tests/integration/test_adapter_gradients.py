"""The gradients of an adapter under GRPO and cross-entropy: ratio, reference, micro-batches (paper Sec. 3.4)."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator

from vismem.config import GrpoConfig, GrpoStageConfig
from vismem.data.sample import read_samples
from vismem.generation.replay import prefill, score
from vismem.models.lora import LoraSettings
from vismem.models.vismem import VisMemModel
from vismem.training import grpo as grpo_losses
from vismem.training.baselines import PolicyGrpo
from vismem.training.run import POLICY_LORA, trainable
from vismem.training.supervised import Supervised, plain_answer

GRPO = GrpoConfig(batch_size=2, max_new_tokens=10, checkpoint_every=2)
STAGE = GrpoStageConfig(steps=4, group_size=4, learning_rate=1e-2)
pytestmark = pytest.mark.usefixtures("scores_differ")


def fresh(base: Path) -> VisMemModel:
    """A model with an adapter as training of a baseline starts with: it changes nothing yet."""
    model = tiny.vismem(base)
    torch.manual_seed(0)
    model.set_policy_lora(LoraSettings(4, 8.0, 0.0, every_linear=True))
    model.policy_lora.enabled = True
    return model


def spread(model: VisMemModel, std: float = 0.05) -> None:
    """Let the adapter do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for up in model.policy_lora.up.values():
            up.normal_(0, std, generator=generator)


def adapted(base: Path) -> tuple[VisMemModel, dict[str, torch.nn.Parameter]]:
    """A model with an adapter that does something, and its parameters."""
    model = fresh(base)
    spread(model)
    return model, trainable(model, POLICY_LORA)


def grpo(model: VisMemModel, data: Path, **changes: Any) -> PolicyGrpo:
    grpo = GRPO.model_copy(update={"batch_size": 8, **changes})
    objective = PolicyGrpo(model, read_samples(data / "data/train"), grpo, STAGE, 0, Accelerator(cpu=True))
    objective.prompts_need_gradient = True
    return objective


def test_the_first_update_of_a_lora_has_ratio_one(
    tiny_base: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh(tiny_base)
    seen = []

    def policy_term(logprobs: torch.Tensor, old: torch.Tensor, advantages: Any, mask: torch.Tensor, *clip: Any) -> Any:
        seen.append((logprobs - old)[mask].exp())
        return grpo_losses.policy_term(logprobs, old, advantages, mask, *clip)

    monkeypatch.setattr("vismem.training.rollout.policy_term", policy_term)
    objective = grpo(model, tiny_data)
    spread(model)  # as if trained: the reference is the policy as it was before
    metrics = objective.backward(objective.collect(0))
    ratio = torch.cat(seen)
    assert len(ratio) > 100
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-5)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl"] > 1e-3, "the reference is the base"


def test_the_reference_of_a_lora_is_the_base(tiny_base: Path, tiny_data: Path) -> None:
    model = fresh(tiny_base)
    objective = grpo(model, tiny_data, batch_size=2)
    spread(model, 0.5)
    batch = objective.collect(0)
    rows = torch.arange(2).repeat_interleave(STAGE.group_size)
    with torch.no_grad():
        reference = objective.reference(batch.policy, prefill(model, batch.samples), batch.rollouts, rows)
        base = tiny.vismem(tiny_base)
        scores = score(base, prefill(base, batch.samples), batch.rollouts, rows)
    assert torch.allclose(reference.logprobs, scores.logprobs, atol=1e-5)
    assert model.policy_lora.enabled


def test_a_fresh_adapter_is_the_reference(tiny_base: Path, tiny_data: Path) -> None:
    objective = grpo(fresh(tiny_base), tiny_data, batch_size=2)
    assert objective.backward(objective.collect(0))["kl"] == 0


def test_eight_micro_batches_of_one_prompt_equal_one_of_eight_in_grpo(tiny_base: Path, tiny_data: Path) -> None:
    gradients = []
    for micro in (STAGE.group_size, 64):
        model, parameters = adapted(tiny_base)
        objective = grpo(model, tiny_data, micro_batch=micro)
        objective.backward(objective.collect(0))
        gradients.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    check_equal(*gradients)


def test_eight_micro_batches_of_one_answer_equal_one_of_eight_in_sft(tiny_base: Path, tiny_data: Path) -> None:
    samples = read_samples(tiny_data / "data/train")
    gradients, losses = [], []
    for micro in (1, 8):
        model, parameters = adapted(tiny_base)
        objective = Supervised(
            model, samples, plain_answer, 0, Accelerator(cpu=True), batch_size=8, micro_batch=micro
        )  # fmt: skip
        objective.prompts_need_gradient = True
        losses.append(objective.backward(objective.collect(0))["loss"])
        gradients.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    check_equal(*gradients)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def check_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert len(first) == 2 * 7 * tiny.SIZE.layers, "down and up of all linear layers"
    for name, gradient in first.items():
        assert gradient.any()
        assert torch.allclose(gradient, second[name], atol=1e-5), name


def test_the_prompt_s_reading_has_its_share_in_the_gradient_of_an_adapter(tiny_base: Path, tiny_data: Path) -> None:
    samples = read_samples(tiny_data / "data/train")
    gradients = []
    for needed in (True, False):
        model, parameters = adapted(tiny_base)
        objective = Supervised(model, samples, plain_answer, 0, Accelerator(cpu=True), batch_size=4, micro_batch=4)
        objective.prompts_need_gradient = needed
        objective.backward(objective.collect(0))
        gradients.append(torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None]))
    assert not torch.allclose(gradients[0], gradients[1], atol=1e-3)
