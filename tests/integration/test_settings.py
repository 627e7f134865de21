"""Every parameter of memory and training reaches what it is named for; none is read under another one's key."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from tiny_stages import GRPO, STAGE, STAGES, Slope, objective_of
from torch import Tensor

from vismem.config import (
    BaselinesConfig,
    BaselinesGrpoConfig,
    Config,
    GrpoConfig,
    GrpoStageConfig,
    InvocationConfig,
    MemoryConfig,
    Section,
    Stage1Config,
    Stage2Config,
    SupervisedConfig,
    WarmStartConfig,
)
from vismem.generation.engine import generate
from vismem.generation.invocation import Learned
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel
from vismem.steps import BY_NAME
from vismem.training import loop
from vismem.training.rollout import RolloutBatch
from vismem.training.run import loop_settings

pytestmark = pytest.mark.usefixtures("scores_differ")


def test_every_setting_of_the_memory_reaches_the_model(tiny_base: Path) -> None:
    memory = MemoryConfig(
        queries=3, short_length=5, long_length=7, builder_layers=3, builder_heads=8, lora_rank=6, lora_alpha=9.0,
        lora_dropout=0.35, short_init="random", long_init="random", init_std=0.5, prompt_pixels=784,
    )  # fmt: skip
    invocation = InvocationConfig(delimiters=(";", ":"), init_token=";", max_per_answer=1, perturbation=0.0)
    model = VisMemModel(load_base(tiny_base), memory, invocation)
    assert model.builder.query_init.shape[0] == 3
    assert [model.length_of(kind) for kind in (MemoryKind.SHORT, MemoryKind.LONG)] == [5, 7]
    assert (len(model.short.memory_init), len(model.long.memory_init)) == (5 * model.backbone.merge, 7)
    assert len(model.builder.layers) == 3
    assert model.backbone.prompt_pixels == 784
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
    ("stage1", "anywhere_after", 1.0),
    ("stage1", "anywhere_share", 0.1),
)


@pytest.fixture(scope="module")
def usual(tiny_base: Path) -> dict[str, Tensor]:
    return {stage: outcome(stage, tiny_base) for stage in STAGES}


@pytest.mark.parametrize(("stage", "name", "value"), CHANGES)
def test_no_setting_of_grpo_is_read_under_another_s_key(
    stage: str, name: str, value: Any, usual: Mapping[str, Tensor], tiny_base: Path
) -> None:
    assert getattr(GRPO if name in GrpoConfig.model_fields else STAGES[stage][1], name) != value
    assert not torch.allclose(outcome(stage, tiny_base, **{name: value}), usual[stage], rtol=1e-3)


def test_the_penalty_counts_where_advantages_are_not_normalised(tiny_base: Path) -> None:
    usual, more = (outcome("stage2", tiny_base, normalise_by_std=False, penalty=penalty) for penalty in (0.3, 2.0))
    assert not torch.allclose(more, usual, rtol=1e-3)


def test_settings_that_are_to_change_nothing_change_nothing(usual: Mapping[str, Tensor], tiny_base: Path) -> None:
    same = outcome("stage1", tiny_base, micro_batch=1, checkpoint_every=7, sample_every=3, learning_rate=0.5)
    torch.testing.assert_close(same, usual["stage1"], atol=1e-6, rtol=1e-4)


def test_every_setting_of_the_loop_arrives_under_its_own_name() -> None:
    common = {"weight_decay": 0.14, "max_grad_norm": 0.15, "updates": 16, "checkpoint_every": 18}
    own = {"steps": 11, "learning_rate": 0.12, "warmup_ratio": 0.13, "target_kl": 0.17}
    config, stage = Config(grpo=GrpoConfig.model_validate(common)), GrpoStageConfig.model_validate(own)
    settings = loop_settings("name", config, stage, samples=99)
    assert {name: getattr(settings, name) for name in common | own} == common | own
    passes = Config(grpo=GrpoConfig(epochs=3, batch_size=8))
    assert loop_settings("name", passes, stage.model_copy(update={"steps": 0}), samples=40).steps == 15


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.2), ("warmup_ratio", 0.9), ("weight_decay", 0.5), ("max_grad_norm", 0.1), ("updates", 3),
     ("target_kl", 0.05), ("steps", 3)],
)  # fmt: skip
def test_every_setting_of_the_loop_moves_the_training(name: str, value: float, tmp_path: Path) -> None:
    usual = {"steps": 4, "learning_rate": 0.1, "warmup_ratio": 0.1, "max_grad_norm": 2.5, "updates": 2}
    ends = []
    for settings in (usual, usual | {name: value}):
        slope, run = Slope(lambda *_: {"update_kl": 0.1}), f"run{len(ends)}"
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

    stage = {**STAGE, "steps": 0}
    warm = WarmStartConfig(steps=1, batch_size=2)
    config = Config(
        memory=tiny.MEMORY,
        invocation=InvocationConfig(delimiters=tuple("abcdefghijklmnopqrstuvwxyz,"), anywhere=True),  # some are spoken
        grpo=GRPO.model_copy(update={"epochs": 1}),
        stage1=Stage1Config(warm_start=warm, anywhere_after=0, **stage),
        stage2=Stage2Config(**stage),
        baselines=BaselinesConfig(
            supervised=SupervisedConfig(steps=0, epochs=1, batch_size=2, longer=2), grpo=BaselinesGrpoConfig(**stage)
        ),
    )
    inputs = {"base": tiny_base, "validate": tiny.save_data(tmp_path / "validate", count=3)}
    monkeypatch.setattr(Section, "__getattribute__", recording, raising=False)
    for name in ("stage1", "stage2", "sft_lora_long", "grpo_lora_long", "static_prefix", "continuous", "full"):
        inputs[name] = tmp_path / name
        inputs[name].mkdir()
        BY_NAME[name].load()(config, inputs, inputs[name])
    monkeypatch.undo()
    sections = (MemoryConfig, InvocationConfig, WarmStartConfig, Stage1Config, Stage2Config, BaselinesConfig)
    for section in (*sections, SupervisedConfig, GrpoConfig, BaselinesGrpoConfig):
        unread = {name for name in section.model_fields if (section, name) not in read}
        assert unread == set(), section.__name__
