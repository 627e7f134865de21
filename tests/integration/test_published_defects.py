"""Defects that published trainers of latent memory were found with, in behaviour: each test names one.

What the source alone shows is in `tests/unit/test_habits.py`; that one row's invocation moves no other row, in
`test_invariants.py`.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from vismem.config import (
    BaselinesConfig,
    Config,
    GrpoConfig,
    InvocationConfig,
    MemoryConfig,
    Section,
    Stage1Config,
    Stage2Config,
    SupervisedConfig,
    WarmStartConfig,
)
from vismem.errors import UserError
from vismem.generation.engine import generate
from vismem.generation.invocation import Learned
from vismem.generation.replay import prefill, without_memory
from vismem.generation.types import Invocation as Invoked
from vismem.generation.types import Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.vismem import VisMemModel, load_base
from vismem.provenance import write_manifest
from vismem.steps import BY_NAME, run_step
from vismem.training import loop
from vismem.training.grpo import group_advantages, negative_penalty
from vismem.training.rollout import GrpoObjective, RolloutBatch
from vismem.training.stage1 import FORMATION, Formation, loop_settings, trainable
from vismem.training.stage2 import INVOCATION, POLICY_LORA, Invocation

GRPO: dict[str, Any] = {"batch_size": 2, "group_size": 4, "max_new_tokens": 8, "kl_coefficient": 0.1}
STAGES: dict[str, tuple[type[GrpoObjective], GrpoConfig, tuple[str, ...]]] = {
    "stage1": (Formation, Stage1Config(steps=4, anywhere_after=0, anywhere_share=0.6, **GRPO), FORMATION),
    "stage2": (Invocation, Stage2Config(steps=4, **GRPO), INVOCATION),
    "stage2 with a LoRA": (Invocation, Stage2Config(steps=4, policy_lora=True, **GRPO), INVOCATION + POLICY_LORA),
}
pytestmark = pytest.mark.usefixtures("scores_differ")


def eager_model(base: Path) -> VisMemModel:
    """A model that invokes often, and whose own adapter changes what it says."""
    model = tiny.vismem(base, tiny.MEMORY.model_copy(update={"lora_dropout": 0.1}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        last = prefill(model, tiny.samples()).last
        model.tokens.bias.fill_(float(model.backbone.head(last).logsumexp(-1).mean()) - 2.0)
        for name, parameter in model.policy_lora.named_parameters():
            if name.startswith("up."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def objective_of(stage: str, base: Path, **changes: Any) -> tuple[GrpoObjective, dict[str, nn.Parameter]]:
    kind, config, trained = STAGES[stage]
    model = eager_model(base)
    model.policy_lora.enabled = POLICY_LORA[0] in trained
    made = kind(model, tiny.samples(), config.model_copy(update=changes), 0, Accelerator(cpu=True))
    made.prompts_need_gradient = model.policy_lora.enabled
    return made, trainable(model, trained)


# --- log-probabilities of text from which the invocations were stripped ----------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_log_probabilities_are_of_the_stream_with_its_memories_so_the_first_ratio_is_one(
    stage: str, tiny_base: Path
) -> None:
    objective, _ = objective_of(stage, tiny_base, clip_low=1e-3, clip_high=1e-3, kl_coefficient=0.0)
    batch = objective.collect(0)
    kinds = {invocation.kind for rollout in batch.rollouts for invocation in rollout.invocations}
    assert kinds == set(MemoryKind)
    metrics = objective.backward(batch)
    assert metrics["clip_fraction"] == 0
    assert metrics["update_kl"] == pytest.approx(0, abs=1e-7)
    assert metrics["loss"] == pytest.approx(0, abs=1e-4), "advantages of a group add up to zero"
    bare = dataclasses.replace(batch, rollouts=tuple(without_memory(rollout) for rollout in batch.rollouts))
    assert objective.backward(bare)["clip_fraction"] > 0.3, "without the memories the ratio would be another"


def test_the_loss_counts_what_was_sampled_and_nothing_that_was_inserted(tiny_base: Path) -> None:
    for stage, invokes_are_sampled in (("stage1", False), ("stage2", True)):
        objective, _ = objective_of(stage, tiny_base)
        for rollout in objective.collect(0).rollouts:
            inserted = set()
            for invocation in rollout.invocations:
                length = objective.model.length_of(invocation.kind)
                inserted |= set(range(invocation.position + invokes_are_sampled, invocation.position + length + 2))
            assert {i for i, sampled in enumerate(rollout.loss_mask) if not sampled} == inserted


# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_setting_of_the_memory_reaches_the_model(tiny_base: Path) -> None:
    memory = MemoryConfig(
        queries=3, short_length=5, long_length=7, builder_layers=3, builder_heads=8, lora_rank=6, lora_alpha=9.0,
        lora_dropout=0.35, short_init="random", long_init="random", init_std=0.5,
    )  # fmt: skip
    invocation = InvocationConfig(delimiters=(";", ":"), init_token=";", max_per_answer=1, perturbation=0.0)
    model = VisMemModel(load_base(tiny_base), memory, invocation)
    assert model.builder.query_init.shape[0] == 3
    assert [model.length_of(kind) for kind in (MemoryKind.SHORT, MemoryKind.LONG)] == [5, 7]
    assert (len(model.short.memory_init), len(model.long.memory_init)) == (5 * model.backbone.merge, 7)
    assert len(model.builder.layers) == 3
    assert {layer.heads for layer in model.builder.layers} == {8}
    for lora in (model.short.lora, model.long.lora):
        assert {weight.shape[0] for weight in lora.down.values()} == {6}
        assert (lora.scale, lora.dropout.p) == (9.0 / 6, 0.35)
    assert float(model.builder.query_init.detach().std()) == pytest.approx(0.5, rel=0.3)
    assert float(model.short.memory_init.detach().std()) == pytest.approx(0.5, rel=0.3)
    assert float(model.long.memory_init.detach().abs().max()) > 0
    ids = model.backbone.processor.tokenizer.convert_tokens_to_ids([";", ":"])
    assert (
        set(ids)
        <= set(model.delimiter_ids)
        < set(VisMemModel(load_base(tiny_base), memory, InvocationConfig()).delimiter_ids)
    )
    assert torch.equal(model.tokens.invoke, model.backbone.embedding.weight[ids[:1]].expand(2, -1))
    with torch.no_grad():
        model.tokens.bias.fill_(1e4)
    assert {len(r.invocations) for r in generate(model, tiny.samples(), Learned(), max_new_tokens=4)} == {1}


def outcome(stage: str, base: Path, **changes: Any) -> Tensor:
    """Everything that a step's gradient consists of, where the ratio is far from one on both sides."""
    objective, trained = objective_of(stage, base, **changes)
    batch: RolloutBatch = objective.collect(3)
    moved = [
        dataclasses.replace(r, logprobs=tuple(p + (-0.1, 0.1, 0.4)[i % 3] for i, p in enumerate(r.logprobs)))
        for r in batch.rollouts
    ]
    objective.backward(dataclasses.replace(batch, rollouts=tuple(moved)))
    return torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None])


CHANGES: tuple[tuple[str, str, Any], ...] = (
    ("stage1", "batch_size", 3),
    ("stage1", "group_size", 6),
    ("stage1", "clip_low", 0.05),
    ("stage1", "clip_high", 0.05),
    ("stage1", "kl_coefficient", 0.5),
    ("stage1", "normalise_by_std", False),
    ("stage1", "temperature", 0.7),
    ("stage1", "max_new_tokens", 5),
    ("stage1", "invoke_probability", 0.9),
    ("stage1", "at_start", False),
    ("stage1", "anywhere_after", 1.0),
    ("stage1", "anywhere_share", 0.1),
    ("stage2 with a LoRA", "kl_coefficient", 0.5),
    ("stage2", "penalty", 2.0),
)


@pytest.fixture(scope="module")
def usual(tiny_base: Path) -> dict[str, Tensor]:
    return {stage: outcome(stage, tiny_base) for stage in STAGES}


@pytest.mark.parametrize(("stage", "name", "value"), CHANGES)
def test_no_setting_of_grpo_is_read_under_another_s_key(
    stage: str, name: str, value: Any, usual: Mapping[str, Tensor], tiny_base: Path
) -> None:
    assert getattr(STAGES[stage][1], name) != value
    assert not torch.allclose(outcome(stage, tiny_base, **{name: value}), usual[stage], rtol=1e-3)


def test_settings_that_are_to_change_nothing_change_nothing(usual: Mapping[str, Tensor], tiny_base: Path) -> None:
    same = outcome("stage1", tiny_base, micro_batch=1, checkpoint_every=7, sample_every=3, learning_rate=0.5)
    torch.testing.assert_close(same, usual["stage1"], atol=1e-6, rtol=1e-4)


def test_every_setting_of_the_loop_arrives_under_its_own_name() -> None:
    values = {
        "steps": 11, "learning_rate": 0.12, "warmup_ratio": 0.13, "weight_decay": 0.14, "max_grad_norm": 0.15,
        "updates": 16, "target_kl": 0.17, "checkpoint_every": 18,
    }  # fmt: skip
    config = GrpoConfig.model_validate(values)
    settings = loop_settings("name", config, samples=99)
    assert {name: getattr(settings, name) for name in values} == values
    assert loop_settings("name", config.model_copy(update={"steps": 0, "epochs": 3}), samples=40).steps == 15


class Slope:
    """An objective whose gradient grows from step to step, and whose policy moves away from the one that sampled."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(1))

    def collect(self, step: int) -> int:
        return step

    def backward(self, batch: int) -> dict[str, float]:
        (self.weight * (batch + 1)).sum().backward()
        return {"update_kl": 0.1}


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.2), ("warmup_ratio", 0.9), ("weight_decay", 0.5), ("max_grad_norm", 0.1), ("updates", 2),
     ("target_kl", 0.05), ("steps", 3)],
)  # fmt: skip
def test_every_setting_of_the_loop_moves_the_training(name: str, value: float, tmp_path: Path) -> None:
    usual = {"steps": 4, "learning_rate": 0.1, "warmup_ratio": 0.1, "max_grad_norm": 2.5}
    ends = []
    for settings in (usual, usual | {name: value}):
        slope, run = Slope(), f"run{len(ends)}"
        loop.train(slope, {"w": slope.weight}, loop.LoopSettings(run, **settings), tmp_path, Accelerator(cpu=True))  # type: ignore[arg-type]
        ends.append(float(slope.weight.detach()))
    assert ends[0] != pytest.approx(ends[1], abs=1e-6)


def test_every_parameter_of_training_is_read_while_training(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that nothing reads promises what it does not do."""
    read = set()

    def recording(self: Section, name: str) -> Any:
        read.add((type(self), name))
        return object.__getattribute__(self, name)

    grpo = {**GRPO, "steps": 0, "epochs": 1}
    supervised = {"steps": 1, "batch_size": 2}
    config = Config(
        memory=tiny.MEMORY,
        invocation=InvocationConfig(delimiters=tuple("abcdefghijklmnopqrstuvwxyz,")),  # so that some are spoken
        stage1=Stage1Config(warm_start=WarmStartConfig(**supervised), anywhere_after=0, **grpo),
        stage2=Stage2Config(**grpo),
        baselines=BaselinesConfig(
            supervised=SupervisedConfig(steps=0, epochs=1, batch_size=2), grpo=GrpoConfig(**grpo)
        ),
    )
    inputs = {"base": tiny_base, "validate": tiny.save_data(tmp_path / "validate", count=3)}
    monkeypatch.setattr(Section, "__getattribute__", recording, raising=False)
    for name in ("stage1", "stage2", "sft_lora", "grpo_lora", "full"):
        inputs[name] = tmp_path / name
        inputs[name].mkdir()
        BY_NAME[name].load()(config, inputs, inputs[name])
    monkeypatch.undo()
    sections = (MemoryConfig, InvocationConfig, WarmStartConfig, Stage1Config, Stage2Config, BaselinesConfig)
    for section in (*sections, SupervisedConfig, GrpoConfig):
        unread = {name for name in section.model_fields if (section, name) not in read}
        assert unread == set(), section.__name__


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_small_micro_batches_equal_one_of_all(stage: str, tiny_base: Path) -> None:
    """Of single rollouts, three and then one of each prompt's four, and three prompts and then the fourth."""
    gradients = []
    for micro in (1, 3, 12, 16):
        objective, trained = objective_of(stage, tiny_base, batch_size=4, group_size=4, micro_batch=micro)
        batch = objective.collect(0)
        assert len({tuple(i.position for i in r.invocations) for r in batch.rollouts}) > 4
        objective.backward(batch)
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None]))
    assert float(gradients[0].norm()) > 0
    for gradient in gradients[:-1]:
        torch.testing.assert_close(gradient, gradients[-1], atol=1e-5, rtol=1e-3)


# --- failures that are swallowed -------------------------------------------------------------------------------------


def test_an_answer_that_cannot_be_scored_ends_the_step_instead_of_counting_as_wrong(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(sample: object, text: str) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr("vismem.training.rewards.score", fault)
    with pytest.raises(ZeroDivisionError):
        objective_of("stage1", tiny_base)[0].collect(0)


# --- stages and promotion that take what lies nearest ----------------------------------------------------------------


def test_stage2_takes_the_stage1_of_its_name_and_not_the_newest_files(tiny_base: Path, tmp_path: Path) -> None:
    config = Config(memory=tiny.MEMORY, stage2=Stage2Config(steps=1, checkpoint_every=1, **GRPO))
    artifacts = tmp_path / "artifacts"
    tiny.save_data(artifacts / "validate", count=3)
    (artifacts / "base").symlink_to(tiny_base)
    named, newer = tiny.vismem(tiny_base, seed=1), tiny.vismem(tiny_base, seed=2)
    named.save_pretrained(artifacts / "stage1")
    for place in ("stage1.partial", "stage1.old", "stage1_b", "zz", "stage1/backup"):
        newer.save_pretrained(artifacts / place)
        for file in (artifacts / place).rglob("*"):
            os.utime(file, (4e9, 4e9))
    run_step("stage2", config, artifacts)
    weights = load_file(artifacts / "stage2" / "memory.safetensors")
    assert weights
    assert all(torch.equal(weight, named.state_dict()[name]) for name, weight in weights.items())


@pytest.mark.parametrize("missing", ["export", "evaluate", "validate"])
def test_nothing_is_judged_before_all_that_it_is_judged_by(missing: str, tmp_path: Path) -> None:
    for name in BY_NAME["register"].inputs:
        if name != missing:
            (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"run `vismem {missing}`"):
        run_step("register", Config(), tmp_path)
    assert BY_NAME["promote"].inputs == ("register",), "what is promoted was judged"
    with pytest.raises(UserError, match="run `vismem register`"):
        run_step("promote", Config(), tmp_path)


def test_a_bundle_is_not_judged_by_the_scores_of_the_model_before_it(tmp_path: Path) -> None:
    """Stage II trained and exported anew, and not evaluated anew."""
    inputs = {name: tmp_path / name for name in BY_NAME["register"].inputs}
    contents: dict[str, dict[str, Any]] = {
        "evaluate/metrics.json": {"arms": {"vanilla": {}, "vismem": {}}, "stage2_sha256": "before"},
        "validate/validation.json": {},
        "export/parity.json": {},
        "export/lineage.json": {"inputs_sha256": {"stage2": "after"}},
    }
    for name, values in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(values))
    write_manifest(inputs["export"])
    with pytest.raises(UserError, match="scores of another model"):
        BY_NAME["register"].load()(Config(), inputs, tmp_path)


# --- penalties (Eq. 14-15) -------------------------------------------------------------------------------------------


def paid(
    rewards: Sequence[float], swapped: Sequence[float], invoking: Sequence[bool], base: Path, penalty: float
) -> list[float]:
    """What one group's trajectories are paid after the penalties, in points of score."""
    with pytest.MonkeyPatch.context() as patch:
        objective, _ = objective_of("stage2", base, group_size=len(rewards), penalty=penalty)
        sample = objective.samples[0]
        rollouts = [plain_or_invoking(objective.model, sample.id, invokes) for invokes in invoking]
        patch.setattr("vismem.training.stage2.generate", lambda *_, **__: rollouts)
        patch.setattr("vismem.training.stage2.rewards_of", lambda *_: torch.tensor([swapped]))
        result: list[float] = objective.shaped(torch.tensor([rewards]), [sample], rollouts, 0)[0].tolist()
        return result


def plain_or_invoking(model: VisMemModel, sample: str, invokes: bool) -> Rollout:
    kind = MemoryKind.SHORT
    start = (model.invoke_ids[kind], *[-1] * model.length_of(kind), model.end_ids[kind]) if invokes else ()
    ids = (*start, 5, 6)
    events = (Invoked(0, kind, False),) if invokes else ()
    return Rollout(sample, ids, (True,) * len(ids), (0.0,) * len(ids), events, "", "", True, 2)


def test_invoking_and_plain_trajectories_of_one_score_pay_the_same(tiny_base: Path) -> None:
    rewards, invoking = [1.0, 1.0, 0.0, 0.0], [True, False, True, False]
    after = paid(rewards, rewards, invoking, tiny_base, penalty=0.3)
    assert after == pytest.approx([1.0, 1.0, -0.15, -0.15]), "p_neg is how far a score is below its group's mean"


def test_the_wrong_kind_is_punished_only_where_its_swap_would_have_scored_higher(tiny_base: Path) -> None:
    """And only where there was a memory to swap, whatever the replay of a plain answer scored."""
    rewards = [0.5, 0.5, 0.5, 0.5]
    after = paid(rewards, [1.0, 0.5, 0.0, 1.0], [True, True, True, False], tiny_base, penalty=0.3)
    assert after == pytest.approx([0.5 - 0.3 * 0.5, 0.5, 0.5, 0.5])


def test_penalties_never_pay_and_grow_with_their_intensity(tiny_base: Path) -> None:
    rewards, swapped, invoking = [1.0, 0.0, 0.5, 0.25], [0.0, 1.0, 0.5, 1.0], [True] * 4
    mild, harsh = (paid(rewards, swapped, invoking, tiny_base, penalty=alpha) for alpha in (0.1, 0.4))
    for score_, less, least in zip(rewards, mild, harsh, strict=True):
        assert least <= less <= score_
        assert score_ - least == pytest.approx(4 * (score_ - less), abs=1e-6)


def test_p_neg_alone_leaves_the_advantages_of_right_and_wrong_answers_as_they_are() -> None:
    """With scores of 0 and 1 it only stretches a group, and dividing by the standard deviation takes that back."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    shaped = rewards - 0.3 * negative_penalty(rewards)
    torch.testing.assert_close(group_advantages(shaped), group_advantages(rewards), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(group_advantages(shaped, False), group_advantages(rewards, False), atol=1e-2)
