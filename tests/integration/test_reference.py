"""Stage II's reference policy is the policy at the stage's start, and beta bounds how far invocation moves from it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_stages
import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from vismem.generation import replay
from vismem.generation.replay import prefill, score
from vismem.models.kinds import MemoryKind
from vismem.training import rollout
from vismem.training.rollout import GrpoObjective, RolloutBatch

KINDS = tuple(MemoryKind)
STAGES = ("stage2", "stage2 with a reader", "stage2 with a LoRA")
Parameters = dict[str, nn.Parameter]
pytestmark = pytest.mark.usefixtures("scores_differ")


def moved(stage: str, base: Path, **changes: Any) -> tuple[GrpoObjective, Parameters, RolloutBatch]:
    """An objective in float64, a batch of it, and a policy that has left the one that training started from."""
    objective, trained = tiny_stages.objective_of(stage, base, **changes)
    objective.model.double()
    objective.model.backbone.model.double()
    objective.start.double()
    batch = objective.collect(0)
    assert {i.kind for r in batch.rollouts for i in r.invocations} == set(KINDS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.double)
    return objective, trained, batch


GROUPS = ("tokens.invoke", "tokens.end", "tokens.head", "tokens.bias", "policy_lora.")
CASES = [(stage, name) for stage in STAGES for name in GROUPS if "LoRA" in stage or name.startswith("tokens.")]
LEAST = {False: 1e-3, True: 1e-5}  # of a slope, with words that are drawn and with the likeliest


@pytest.mark.parametrize(
    ("stage", "name", "best_words"), [(*case, False) for case in CASES] + [(*case, True) for case in CASES[:4]]
)
def test_the_gradient_is_that_of_the_loss(
    stage: str, name: str, best_words: bool, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By central differences, at a beta that makes the KL term count."""
    monkeypatch.setattr(Qwen2_5_VLRMSNorm, "forward", norm)
    objective, trained, batch = moved(stage, tiny_base, kl_coefficient=3.0, best_words=best_words)
    chosen = [parameter for key, parameter in trained.items() if key.startswith(name)]
    assert objective.backward(batch)["kl"] > 1e-3
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        ways = [torch.randn(p.shape, generator=generator, dtype=torch.double) for p in chosen]
        analytic = sum(float((p.grad * way).sum()) for p, way in zip(chosen, ways, strict=True) if p.grad is not None)
        losses = [loss_at(objective, batch, trained, chosen, ways, step) for step in (1e-4, -1e-4)]
        assert abs(analytic) > LEAST[best_words]
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(analytic, rel=1e-3)


def norm(self: Any, hidden: Tensor) -> Tensor:
    """Hugging Face's computes in float32, whatever the weights."""
    scale: Tensor = self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
    return scale


def loss_at(
    objective: GrpoObjective,
    batch: RolloutBatch,
    trained: Parameters,
    chosen: Sequence[nn.Parameter],
    ways: Sequence[Tensor],
    step: float,
) -> float:
    """The loss where `chosen` are moved by `step` times `ways`. Parameters and gradients stay as they are."""
    kept = [(parameter.data, parameter.grad) for parameter in trained.values()]
    for parameter in trained.values():
        parameter.grad = None
    for parameter, way in zip(chosen, ways, strict=True):
        parameter.data = parameter.data + step * way
    loss = objective.backward(batch)["loss"]
    for parameter, (value, gradient) in zip(trained.values(), kept, strict=True):
        parameter.data, parameter.grad = value, gradient
    return loss


@pytest.mark.parametrize("stage", STAGES)
def test_the_reference_is_the_policy_before_training_whatever_training_does(stage: str, tiny_base: Path) -> None:
    objective, _, batch = moved(stage, tiny_base)
    start, _ = tiny_stages.objective_of(stage, tiny_base)  # the same rows, the same adapter
    start.model.double()
    start.model.backbone.model.double()
    rows = torch.arange(len(batch.samples)).repeat_interleave(objective.stage.group_size)
    with torch.no_grad():
        now = objective.scores(batch.policy, prefill(objective.model, batch.samples), batch.rollouts, rows)
        found = objective.reference(batch.policy, prefill(objective.model, batch.samples), batch.rollouts, rows)
        context = prefill(start.model, batch.samples)
        expected = score(start.model, context, batch.rollouts, rows, batch.policy)
    torch.testing.assert_close(found.logprobs, expected.logprobs)
    assert not torch.allclose(found.logprobs, now.logprobs, atol=1e-2)
    invoked = [(row, i.position) for row, r in enumerate(batch.rollouts) for i in r.invocations]
    assert all(bool(found.mask[place]) and float(found.logprobs[place]) < 0 for place in invoked)


@pytest.mark.parametrize("stage", STAGES)
def test_kl_is_k3_of_every_sampled_token_invocations_included(stage: str, tiny_base: Path) -> None:
    objective, _, batch = moved(stage, tiny_base)
    rows = torch.arange(len(batch.samples)).repeat_interleave(objective.stage.group_size)
    with torch.no_grad():
        now, then = (
            scored(batch.policy, prefill(objective.model, batch.samples), batch.rollouts, rows)
            for scored in (objective.scores, objective.reference)
        )
    ratio = (then.logprobs - now.logprobs)[now.mask].exp()
    expected = float((ratio - ratio.log() - 1).mean())
    reversed_ = float((1 / ratio + ratio.log() - 1).mean())
    assert abs(expected - reversed_) > 1e-2 * expected, "the two directions must be told apart"
    assert objective.backward(batch)["kl"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_at_the_start_of_stage2_kl_is_zero_and_after_a_step_of_the_policy_it_is_not(
    stage: str, tiny_base: Path
) -> None:
    objective, trained = tiny_stages.objective_of(stage, tiny_base)
    batch = objective.collect(0)
    assert objective.backward(batch)["kl"] == 0
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    torch.optim.AdamW(trained.values(), lr=1e-2).step()
    assert objective.backward(batch)["kl"] > 1e-5


def test_beta_draws_invocation_back_to_where_it_started(tiny_base: Path) -> None:
    """With no advantages there is nothing else in the loss."""
    objective, trained, batch = moved("stage2", tiny_base, kl_coefficient=1.0)
    batch = RolloutBatch(batch.samples, batch.rollouts, torch.zeros_like(batch.advantages), batch.policy, {})
    optimizer, found = torch.optim.SGD(trained.values(), lr=0.1), []
    for _ in range(4):
        optimizer.zero_grad()
        found.append(objective.backward(batch)["kl"])
        optimizer.step()
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize(("stage", "beta", "passes"), [(s, b, 1 + (b > 0)) for s in tiny_stages.STAGES for b in (0, 1)])
def test_without_beta_the_reference_reads_nothing(
    stage: str, beta: float, passes: int, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, _ = tiny_stages.objective_of(stage, tiny_base, kl_coefficient=beta)
    batch, calls = objective.collect(0), []
    monkeypatch.setattr(rollout, "score", counted(replay.score, calls))
    metrics = objective.backward(batch)
    assert len(calls) == passes
    assert ("kl" in metrics) == (beta > 0), "what was not measured has no figure"


def counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        calls.append(function.__name__)
        return function(*arguments, **more)

    return call
