"""Both stages on a tiny model: what they change, what they leave alone, and that a kill costs nothing."""

import json
from pathlib import Path

import pytest
import tiny
import tiny_families
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from vismem.config import Config, Stage1Config, Stage2Config, WarmStartConfig
from vismem.data.sample import read_samples
from vismem.generation.engine import generate
from vismem.generation.invocation import Learned, Random
from vismem.generation.replay import read_prompts, score
from vismem.models.vismem import VisMemModel
from vismem.training import loop
from vismem.training.rollout import GrpoObjective
from vismem.training.stage1 import FORMATION, Formation, stage1, trainable
from vismem.training.stage2 import Invocation, fit_invocation, stage2

GRPO = {"batch_size": 2, "group_size": 4, "max_new_tokens": 10, "checkpoint_every": 2, "learning_rate": 1e-2}
STAGE1 = Stage1Config(steps=4, warm_start=WarmStartConfig(steps=3, batch_size=4), **GRPO)  # type: ignore[arg-type]
STAGE2 = Stage2Config(steps=4, **GRPO)  # type: ignore[arg-type]
CONFIG = Config(memory=tiny.MEMORY, stage1=STAGE1, stage2=STAGE2)


@pytest.fixture(autouse=True)
def _scores_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is never right: score answers by their length instead, so that groups have spread."""
    monkeypatch.setattr(
        "vismem.training.rewards.score", lambda sample, text: float(sum(map(ord, text)) % 2), raising=True
    )


@pytest.fixture(scope="module")
def stages(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stages")
    inputs = {"base": tiny_base, "validate": tiny_data}
    for name, step in (("stage1", stage1), ("stage2", stage2)):
        (folder / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vismem.training.rewards.score", lambda sample, text: float(sum(map(ord, text)) % 2))
            step(CONFIG, inputs, folder / name)
        inputs[name] = folder / name
    return inputs


def weights(folder: Path, file: str = "memory.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / file)


def test_stage1_trains_every_part_of_formation_and_leaves_the_policy(stages: dict[str, Path], tiny_base: Path) -> None:
    fresh = VisMemModel(
        tiny.vismem(tiny_base).backbone, CONFIG.memory, CONFIG.invocation, CONFIG.seed
    ).state_dict()  # fmt: skip
    after = weights(stages["stage1"])
    unchanged = [name for name, value in after.items() if torch.equal(value, fresh[name])]
    assert unchanged == []
    policy = weights(stages["stage1"], "policy.safetensors")
    assert all(torch.equal(value, fresh[name]) for name, value in policy.items())


def test_stage1_leaves_every_weight_of_the_base_bit_identical(tiny_base: Path, tiny_data: Path) -> None:
    model = tiny.vismem(tiny_base)
    before = {name: value.clone() for name, value in model.backbone.model.state_dict().items()}
    objective = Formation(model, read_samples(tiny_data / "data/train"), STAGE1, 0, Accelerator(cpu=True))
    settings = loop.LoopSettings("t", 2, 1e-2, 0.1)
    loop.train(objective, trainable(model, FORMATION), settings, tiny_data, Accelerator(cpu=True))
    after = model.backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_a_stage_keeps_a_group_of_answers_every_few_steps(name: str, stages: dict[str, Path]) -> None:
    lines = (stages[name] / "samples" / "000000.jsonl").read_text().splitlines()
    assert len(lines) == GRPO["group_size"]
    assert json.loads(lines[0]).keys() == {"question", "reference", "answer", "reward"}


@pytest.mark.parametrize(("name", "samples", "rollouts"), [("stage1", 3 * 4 + 4 * 2, 4 * 2 * 4), ("stage2", 8, 32)])
def test_a_stage_says_what_its_training_took(name: str, samples: int, rollouts: int, stages: dict[str, Path]) -> None:
    figures = json.loads((stages[name] / "metrics.json").read_text())
    assert (figures["train_samples"], figures["train_rollouts"]) == (samples, rollouts)
    held = weights(stages[name], "memory.safetensors" if name == "stage1" else "policy.safetensors")
    trained = {n: w for n, w in held.items() if not n.startswith("policy_lora.")}
    assert figures["trainable_parameters"] == sum(w.numel() for w in trained.values())


def test_stage2_changes_only_the_new_tokens_rows(stages: dict[str, Path]) -> None:
    formation, after = weights(stages["stage1"]), weights(stages["stage2"])
    assert all(torch.equal(formation[name], after[name]) for name in formation)
    before = weights(stages["stage1"], "policy.safetensors")
    changed = {n for n, v in weights(stages["stage2"], "policy.safetensors").items() if not torch.equal(v, before[n])}
    assert {"tokens.head", "tokens.bias"} <= changed <= {"tokens.head", "tokens.bias", "tokens.invoke", "tokens.end"}


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_a_killed_and_resumed_stage_equals_an_unbroken_one(
    name: str, stages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"stage1": stage1, "stage2": stage2}[name]
    collect, calls = GrpoObjective.collect, []

    def killed(self: GrpoObjective, at: int) -> object:
        calls.append(at)
        if at == 3 and calls.count(3) == 1:
            raise KeyboardInterrupt
        return collect(self, at)

    monkeypatch.setattr(GrpoObjective, "collect", killed)
    with pytest.raises(KeyboardInterrupt):
        step(CONFIG, stages, tmp_path)
    step(CONFIG, stages, tmp_path)
    assert calls == [0, 1, 2, 3, 2, 3], "the second run goes on from the checkpoint behind step 1"
    for file in ("memory.safetensors", "policy.safetensors"):
        expected, resumed = weights(stages[name], file), weights(tmp_path, file)
        assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    assert (tmp_path / f"{name}.csv").read_text() == (stages[name] / f"{name}.csv").read_text()


def test_metrics_of_the_same_seed_are_the_same(stages: dict[str, Path], tmp_path: Path) -> None:
    stage1(CONFIG, stages, tmp_path)
    first, again = (json.loads((folder / "metrics.json").read_text()) for folder in (stages["stage1"], tmp_path))
    assert first.pop("train_seconds") > 0
    assert again.pop("train_seconds") > 0
    assert first == again


@pytest.mark.parametrize(("kind", "micro_batch"), [(Formation, 4), (Formation, 3), (Invocation, 4)])
def test_eight_micro_batches_of_one_equal_one_of_eight(
    kind: type, micro_batch: int, tiny_base: Path, tiny_data: Path
) -> None:
    """Of one prompt's group each; or of three of the four answers to a prompt and then the fourth."""
    samples = read_samples(tiny_data / "data/train")
    gradients = []
    for micro in (micro_batch, 64):
        model = tiny.vismem(tiny_base)
        config = (STAGE1 if kind is Formation else STAGE2).model_copy(update={"batch_size": 8, "micro_batch": micro})
        parameters = trainable(model, FORMATION if kind is Formation else ("tokens.",))
        objective = kind(model, samples, config, 0, Accelerator(cpu=True))
        objective.backward(objective.collect(0))
        gradients.append({n: p.grad for n, p in parameters.items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


@pytest.mark.parametrize("variant", tiny_families.VARIANTS[:4])
def test_gradient_checkpointing_leaves_every_gradient_of_formation(
    variant: str, tiny_data: Path, tmp_path: Path
) -> None:
    """The adapters are on while a memory is formed, and off again when the backward pass runs the layers once more."""
    _compare_checkpointing(tiny_families.save_base(tmp_path, variant), tiny_data, Formation, STAGE1, FORMATION)


def test_gradient_checkpointing_leaves_every_gradient_of_invocation(tiny_base: Path, tiny_data: Path) -> None:
    config = STAGE2.model_copy(update={"policy_lora": True})
    _compare_checkpointing(tiny_base, tiny_data, Invocation, config, ("tokens.", "policy_lora."))


def _compare_checkpointing(base: Path, data: Path, kind: type, config: Stage1Config, trained: tuple[str, ...]) -> None:
    samples, found = read_samples(data / "data/train"), []
    for on in (False, True):
        model = tiny.vismem(base)
        with torch.no_grad():
            model.tokens.head.copy_(torch.randn(model.tokens.head.shape, generator=torch.Generator().manual_seed(0)))
        parameters = trainable(model, trained)
        model.policy_lora.enabled = "policy_lora." in trained
        settings = config.model_copy(update={"gradient_checkpointing": on})
        objective = kind(model, samples, settings, 0, Accelerator(cpu=True))
        objective.prompts_need_gradient = model.policy_lora.enabled
        batch = objective.collect(0)
        assert any(r.invocations for r in batch.rollouts)
        objective.backward(batch)
        found.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
        assert "forward" not in vars(model.backbone.model.model.language_model.layers[0])
    assert found[0].keys() == found[1].keys()
    assert any(".lora." in name or "policy_lora." in name for name in found[0])
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6, rtol=1e-4), name


def test_gradient_checkpointing_keeps_fewer_activations(tiny_base: Path) -> None:
    model, samples = tiny.vismem(tiny_base), tiny.samples()[:2]
    rollouts = generate(model, samples, Random(probability=0.5, anywhere=0.5), max_new_tokens=10, temperature=1.0)
    held = []
    for on in (False, True):
        numbers: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, n=numbers: n.append(x.numel()) or x, lambda x: x)
        with model.checkpointed(on), hooks:
            score(model, read_prompts(model, samples), rollouts, torch.arange(2))
        held.append(sum(numbers))
    assert held[1] < held[0] / 2


def test_the_first_update_has_ratio_one(tiny_base: Path, tiny_data: Path) -> None:
    """What sampling recorded is what the update computes: nothing is clipped, the policy term is the mean advantage."""
    model = tiny.vismem(tiny_base)
    trainable(model, FORMATION)
    config = STAGE1.model_copy(update={"kl_coefficient": 0.0, "batch_size": 4})
    objective = Formation(model, read_samples(tiny_data / "data/train"), config, 0, Accelerator(cpu=True))
    metrics = objective.backward(objective.collect(0))
    assert metrics["clip_fraction"] == 0
    assert metrics["loss"] == pytest.approx(0, abs=1e-4), "advantages of a group add up to zero"


def test_the_start_of_stage2_invokes_with_about_the_chosen_chance(tiny_base: Path) -> None:
    model, samples = tiny.vismem(tiny_base), tiny.samples()
    config = STAGE2.model_copy(update={"start_probability": 0.5})
    fit_invocation(model, samples, config, seed=0)
    rollouts = generate(model, samples, Learned(), max_new_tokens=1, temperature=1.0, group_size=32)
    at_start = sum(bool(r.invocations) for r in rollouts) / len(rollouts)
    assert at_start == pytest.approx(0.5, abs=0.15)
