"""Two processes that hold the language model together compute what one with the whole of it does."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published
import pytest
import test_evaluate_ranks
import test_launch
import tiny
import tiny_families
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from recipes.tiny_vlm.model import Size
from vismem.config import BaseConfig, Config, InvocationConfig, parse_config, resolve
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.generation.engine import generate
from vismem.generation.invocation import Random
from vismem.generation.loop import DecodeLoop, Request
from vismem.generation.replay import prefill, score
from vismem.generation.torch_executor import TorchExecutor
from vismem.launch import launch_step
from vismem.launch.torchrun import run_processes
from vismem.models.attention import Look
from vismem.models.loading import load_base
from vismem.models.lora import LoraSettings
from vismem.models.tensor_parallel import check_shares
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel
from vismem.plan import host_memory, plan
from vismem.plan.machine import Machine
from vismem.plan.model import Questions, hollow_base
from vismem.plan.rehearsal import Rehearsal
from vismem.plan.shapes import Shapes, beside_dispatch
from vismem.ranks import join_ranks
from vismem.steps import run_step
from vismem.training.baselines import full
from vismem.training.grpo import rollout_means

TOGETHER = {"tensor_parallel": True}
_scores_differ, one, inputs = test_launch._scores_differ, test_launch.one, test_evaluate_ranks.inputs
evaluated = test_evaluate_ranks.one


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for variant in tiny_families.VARIANTS:
        tiny_families.save_base(folder / variant, variant)
    return folder


def model_of(base: Path) -> VisMemModel:
    """A model whose every adapter says something, the policy's on all linear layers."""
    model = VisMemModel(load_base(base, tensor_parallel=True), tiny.MEMORY, InvocationConfig(max_per_answer=3))
    model.set_policy_lora(LoraSettings(4, 8, 0.0, every_linear=True))
    model.policy_lora.enabled = True
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name or ".down." in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


@torch.inference_mode()
def looks_of(model: VisMemModel, sample: Sample) -> Tensor:
    """The share of attention on images of a memory of each kind."""
    looks: list[Look] = []
    loop = DecodeLoop(TorchExecutor(model))
    for kind in KINDS:
        loop.join(Request([sample], Random(probability=1.0, kinds=(kind,)), max_new_tokens=2, looks=looks))
    while loop.step():
        pass
    assert len(looks) == 2
    return torch.tensor([look.share for look in looks])


@dataclass
class Found:
    """What one process has of a family, and computes with it."""

    held: int  # bytes
    answers: list[tuple[int, ...]]
    logprobs: Tensor
    looks: Tensor
    gradients: dict[str, Tensor]


def answer_and_learn(bases: Path, out: Path) -> str:
    """Answers with memories, where these looked, log-probabilities and a gradient of each family: to a file."""
    ranks, found, greedy = join_ranks(), {}, TorchExecutor._greedy
    if os.environ.get("RANK") == "1":  # it would choose otherwise, as sums of other GPUs may
        TorchExecutor._greedy = lambda *given: (greedy(*given) + 1) % 7  # type: ignore[method-assign]
    for variant in tiny_families.VARIANTS:
        model, samples = model_of(bases / variant), tiny_families.samples()
        held = sum(getattr(weight, "_local_tensor", weight).nbytes for weight in model.backbone.model.parameters())
        rollouts = generate(model, samples, Random(probability=0.5), max_new_tokens=20, seed=1)
        looks = looks_of(model, samples[0])
        model.requires_grad_(True)
        with model.checkpointed(variant == "qwen2_5_vl"):
            scores = score(model, prefill(model, samples), rollouts, torch.arange(len(samples)))
            rollout_means(scores.logprobs, scores.mask).sum().backward()  # type: ignore[no-untyped-call]
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        said = [rollout.token_ids for rollout in rollouts]
        found[variant] = Found(held, said, scores.logprobs.detach(), looks, gradients)
    torch.save(found, out / os.environ.get("RANK", "alone"))
    ranks.leave()
    return ""


@pytest.fixture(scope="module")
def found(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By process, by family."""
    out = tmp_path_factory.mktemp("found")
    answer_and_learn(bases, out)
    run_processes(2, answer_and_learn, bases, out)
    return {file.name: torch.load(file, weights_only=False) for file in out.iterdir()}


@pytest.mark.parametrize("variant", tiny_families.VARIANTS)
def test_answers_and_gradients_are_those_of_the_whole_model(found: dict[str, Any], variant: str) -> None:
    alone, first, second = (found[name][variant] for name in ("alone", "0", "1"))
    assert first.answers == alone.answers
    assert torch.allclose(first.logprobs, alone.logprobs, atol=1e-5)
    assert torch.allclose(first.looks, alone.looks, atol=1e-5)
    assert first.gradients.keys() == alone.gradients.keys()
    for name, gradient in alone.gradients.items():
        assert torch.allclose(first.gradients[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max())), name
        assert torch.equal(first.gradients[name], second.gradients[name]), f"{name}: the processes would drift apart"
    assert second.answers == first.answers
    assert torch.equal(first.logprobs, second.logprobs)
    assert any(float(gradient.abs().max()) > 0 for name, gradient in alone.gradients.items() if "down_proj" in name)


@pytest.mark.parametrize("variant", tiny_families.VARIANTS)
def test_a_process_holds_what_is_planned(found: dict[str, Any], bases: Path, variant: str) -> None:
    with beside_dispatch(), Shapes():
        shapes = hollow_base(BaseConfig(model=str(bases / variant), tensor_parallel=True), processes=2)
    planned = sum(weight.nbytes for weight in shapes.model.parameters())
    assert {found[rank][variant].held for rank in ("0", "1")} == {planned}
    assert planned < found["alone"][variant].held


def test_both_stages_and_a_baseline_are_those_of_one_process(one: dict[str, Path], tmp_path: Path) -> None:
    """Stage II's rows but for what the fit of its first chances makes of rounding."""
    grpo = {"baselines": {"grpo": {**test_launch.STAGE, "learning_rate": 1e-3}}}
    alone = parse_config({**test_launch.CONFIG.model_dump(by_alias=True), **grpo})
    together = alone.model_copy(update={"base": BaseConfig(**TOGETHER)})
    run_step("grpo_lora", alone, tmp_path / "one", one)
    for name in ("stage1", "grpo_lora", "stage2"):
        launch_step(name, together, tmp_path, one, test_launch.TORCHRUN)
    test_launch.assert_same("stage1", one["stage1"], tmp_path / "stage1")
    test_launch.assert_same("grpo_lora", tmp_path / "one" / "grpo_lora", tmp_path / "grpo_lora")
    rows, expected = (load_file(folder / "stage2/policy.safetensors") for folder in (tmp_path, one["stage2"].parent))
    for name in ("tokens.head", "tokens.bias", "tokens.invoke"):
        assert torch.allclose(rows[name], expected[name], atol=5e-3), name


def test_evaluated_answers_are_those_of_one_process(inputs: dict[str, Path], evaluated: Path, tmp_path: Path) -> None:
    together = test_evaluate_ranks.CONFIG.model_copy(update={"base": BaseConfig(**TOGETHER)})
    launch_step("evaluate", together, tmp_path, inputs, test_evaluate_ranks.TWO)
    test_evaluate_ranks.assert_same(evaluated, tmp_path / "evaluate")


def config_of(base: Path, **settings: Any) -> Config:
    return parse_config({"base": {"model": str(base), **settings}, "memory": tiny.MEMORY.model_dump()})


def test_a_batch_is_not_divided_among_processes_that_hold_the_base_together(bases: Path) -> None:
    """In a plan, too: three answer a batch of 8; each has less of the base, and the host with it."""
    base = bases / "qwen2_5_vl"
    with pytest.raises(UserError, match="must be a multiple of the 3 GPUs"):
        plan(config_of(base), "3xH100", "84x84", ["stage1"])
    whole, together = config_of(base), config_of(base, **TOGETHER)
    first, second = (plan(config, "2xH100", "84x84", ["stage1"]) for config in (whole, together))
    assert second.steps[0].rows == 2 * first.steps[0].rows
    assert next(iter(host_memory(together, 2).values())) < next(iter(host_memory(whole, 2).values()))


def test_the_plan_of_a_base_that_a_gpu_cannot_hold_proposes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "SIZE", Size(width=256, layers=8, heads=2, vision_width=32, vision_layers=2))
    machine = Machine.named("2xH100")
    config = parse_config({"base": {"model": str(tiny.save_base(tmp_path))}, "memory": tiny.MEMORY.model_dump()})
    needed = Rehearsal("evaluate", config, machine, Questions((84, 84))).rehearse()
    monkeypatch.setattr(Machine, "usable", needed.fixed - 1)
    found = plan(config, machine, "84x84", ["evaluate"]).remedies["evaluate"]
    assert found is not None
    assert found["base.tensor_parallel"]
    changed = resolve(overrides=config.model_dump(by_alias=True) | found)
    assert plan(changed, machine, "84x84", ["evaluate"]).remedies == {}


def test_a_base_that_the_processes_cannot_share_is_refused(bases: Path, tmp_path: Path) -> None:
    settings = AutoConfig.from_pretrained(published.save_published(tmp_path, "Qwen2.5-VL-7B-Instruct")).text_config
    check_shares(settings, 4)
    with pytest.raises(UserError, match="8 processes cannot share the base's num_attention_heads of 28"):
        check_shares(settings, 8)
    with pytest.raises(UserError, match="3 processes cannot share"):
        plan(config_of(bases / "qwen2_5_vl", **TOGETHER), "3xH100", "84x84", ["stage1"])


def test_the_base_is_not_trained_in_shares(bases: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="full trains the base's own weights"):
        full(config_of(bases / "qwen2_5_vl", **TOGETHER), {}, tmp_path)
