"""Every objective learns the right way: a rewarded answer becomes likelier, an unrewarded one less likely."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import tiny_stages
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from vismem.config import Config, Stage2Config
from vismem.generation.replay import prefill, score
from vismem.models.lora import LoraSettings
from vismem.models.variants import Continuous, StaticPrefix
from vismem.models.vismem import VisMemModel
from vismem.training.baselines import answer_behind_memory
from vismem.training.grpo import rollout_means
from vismem.training.loop import LoopSettings, Metrics, Objective, train
from vismem.training.rewards import rewards_of
from vismem.training.rollout import GrpoObjective, RolloutBatch
from vismem.training.run import FORMATION, POLICY_LORA, PREFIX, Parameters, trainable
from vismem.training.stage2 import stage2
from vismem.training.supervised import Supervised, answer_with_memory, plain_answer

OBJECTIVES = (*tiny_stages.STAGES, *tiny_stages.BASELINE)
ONE_STEP = LoopSettings("step", steps=1, learning_rate=1e-4, warmup_ratio=0.0)
pytestmark = pytest.mark.usefixtures("scores_differ")


@dataclass
class OneBatch:
    """An objective whose every step has the same batch."""

    objective: GrpoObjective
    batch: RolloutBatch

    def collect(self, step: int) -> RolloutBatch:
        return self.batch

    def backward(self, batch: RolloutBatch) -> Metrics:
        return self.objective.backward(batch)


def learn(objective: Objective, trained: Parameters, folder: Path) -> None:
    """One small step of the real loop and optimiser."""
    train(objective, trained, ONE_STEP, folder, Accelerator(cpu=True))


@torch.no_grad()
def likelihoods(objective: GrpoObjective, batch: RolloutBatch) -> Tensor:
    """(R,) mean log-probability of each answer's sampled tokens."""
    rows = torch.arange(len(batch.rollouts)) // objective.stage.group_size
    found = objective.scores(batch.policy, prefill(objective.model, batch.samples), batch.rollouts, rows)
    return rollout_means(found.logprobs, found.mask)


def made(name: str, base: Path) -> tuple[GrpoObjective, Parameters]:
    """Without a KL term and penalties: the reward is all there is to learn from."""
    changes = {"penalty": 0.0} if name.startswith("stage2") else {}
    return tiny_stages.objective_of(name, base, kl_coefficient=0.0, batch_size=1, group_size=8, **changes)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_answer_with_a_positive_advantage_becomes_likelier_and_one_with_a_negative_less_likely(
    name: str, advantage: float, tiny_base: Path, tmp_path: Path
) -> None:
    objective, trained = made(name, tiny_base)
    batch = objective.collect(0)
    row = next((row for row, r in enumerate(batch.rollouts) if r.invocations), 0)  # stage I moves no others
    alone = torch.zeros(8).index_fill(0, torch.tensor([row]), advantage)
    batch = replace(batch, advantages=alone)
    before = likelihoods(objective, batch)[row]
    learn(OneBatch(objective, batch), trained, tmp_path)
    change = float(likelihoods(objective, batch)[row] - before)
    assert abs(change) > 1e-5
    assert (change > 0) == (advantage > 0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rewarded_answers_gain_on_unrewarded_ones_of_their_group(name: str, tiny_base: Path, tmp_path: Path) -> None:
    objective, trained = made(name, tiny_base)
    batch = objective.collect(0)
    rewarded = rewards_of(batch.samples, list(batch.rollouts))[0] == 1
    assert 0 < int(rewarded.sum()) < 8
    gaps = []
    for _ in range(2):
        found = likelihoods(objective, batch)
        gaps.append(float(found[rewarded].mean() - found[~rewarded].mean()))
        if len(gaps) == 1:
            learn(objective, trained, tmp_path)
    assert gaps[1] > gaps[0] + 1e-5


@pytest.mark.parametrize(("loss_type", "share"), [("grpo", 1.0), ("dr_grpo", 0.5)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_answers_are_divided_by_the_longest_that_is_allowed_or_by_their_own_length(
    name: str, loss_type: str, share: float, tiny_base: Path
) -> None:
    """The same answers where twice as many tokens would be allowed."""
    objective, trained = tiny_stages.objective_of(name, tiny_base, loss_type=loss_type)
    batch, gradients = objective.collect(0), []
    for _ in range(2):
        objective.model.zero_grad()
        objective.backward(batch)
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None]))
        objective.grpo = objective.grpo.model_copy(update={"max_new_tokens": 2 * objective.grpo.max_new_tokens})
    assert float(gradients[0].norm()) > 0
    torch.testing.assert_close(gradients[1], share * gradients[0])


WRITTEN = {
    "warm start": (partial(answer_with_memory, probability=0.4), FORMATION),
    "sft_lora": (plain_answer, POLICY_LORA),
    "sft_lora_vision": (plain_answer, ("policy_lora.down.vision", "policy_lora.up.vision")),  # that part alone
    "static_prefix": (answer_behind_memory, PREFIX),
    "continuous": (answer_behind_memory, ("builder.", "short.")),
}
KINDS = {"static_prefix": StaticPrefix, "continuous": Continuous}


@pytest.mark.parametrize("name", WRITTEN)
def test_supervised_training_makes_its_batch_likelier(name: str, tiny_base: Path, tmp_path: Path) -> None:
    written, names = WRITTEN[name]
    model = tiny.vismem(tiny_base, kind=KINDS.get(name, VisMemModel))
    model.set_policy_lora(LoraSettings(4, 8.0, 0.0, vision=name == "sft_lora_vision"))
    model.policy_lora.enabled = names[0].startswith(POLICY_LORA)
    trained = trainable(model, names)
    objective = Supervised(model, tiny.samples(), written, 0, Accelerator(cpu=True), 8, 8)
    objective.prompts_need_gradient = model.policy_lora.enabled
    samples, answers = objective.collect(0)
    found = []
    for _ in range(2):
        with torch.no_grad():
            scores = score(model, prefill(model, samples), answers, torch.arange(8))
        found.append(float(rollout_means(scores.logprobs, scores.mask).mean()))
        if len(found) == 1:
            assert objective.backward((samples, answers))["loss"] == pytest.approx(-found[0], rel=1e-5)
            learn(objective, trained, tmp_path)
    assert found[1] > found[0] + 1e-5


def test_each_part_of_the_policy_learns_at_its_own_rate_in_stage2(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """AdamW's first step is the rate itself, whatever the gradient."""
    tiny.vismem(tiny_base).save_pretrained(tmp_path / "stage1")
    rates = {"learning_rate": 1e-2, "end_lr_scale": 0.3, "policy_learning_rate": 2e-3}
    stage = Stage2Config(steps=1, group_size=8, policy_lora=True, **rates)
    config = Config(memory=tiny.MEMORY, grpo=tiny_stages.GRPO, stage2=stage)
    (tmp_path / "stage2").mkdir()
    inputs = {"base": tiny_base, "validate": tiny_data, "stage1": tmp_path / "stage1"}
    stage2(config, inputs, tmp_path / "stage2")
    before, after = (load_file(tmp_path / name / "policy.safetensors") for name in ("stage1", "stage2"))
    moved = {name: float((after[name] - before[name]).abs().max()) for name in after}
    assert moved["tokens.invoke"] == pytest.approx(1e-2, rel=0.05)
    assert moved["tokens.end"] == pytest.approx(0.3 * 1e-2, rel=0.05)
    ups = [size for name, size in moved.items() if ".up." in name]
    assert ups == pytest.approx([2e-3] * len(ups), rel=0.05)
