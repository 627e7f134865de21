"""The reader: the policy's own LoRA that the warm start trains beside formation. It stays on in both stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from vismem.config import Config, GrpoConfig, Stage1Config, Stage2Config, WarmStartConfig
from vismem.files import read_json
from vismem.generation import batches
from vismem.generation.engine import generate
from vismem.generation.invocation import Off
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel
from vismem.training import rollout, supervised
from vismem.training.run import POLICY_LORA
from vismem.training.stage1 import stage1
from vismem.training.stage2 import stage2

STAGE: dict[str, Any] = {"steps": 2, "group_size": 4, "learning_rate": 1e-2}
WARM = WarmStartConfig(steps=3, batch_size=4)
CONFIG = Config(
    memory=tiny.MEMORY,
    grpo=GrpoConfig(batch_size=2, max_new_tokens=8),
    stage1=Stage1Config(warm_start=WARM, **STAGE),
    stage2=Stage2Config(**STAGE),
)
STEPS: dict[str, Callable[..., str]] = {"stage1": stage1, "stage2": stage2}
pytestmark = pytest.mark.usefixtures("scores_differ")


def warmed(**changes: Any) -> Config:
    """The parameters with another warm start."""
    warm = WARM.model_copy(update=changes)
    return CONFIG.model_copy(update={"stage1": CONFIG.stage1.model_copy(update={"warm_start": warm})})


@pytest.fixture(scope="module")
def inputs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"base": tiny_base, "validate": tiny.save_data(tmp_path_factory.mktemp("validate"), count=4)}


@pytest.fixture(scope="module")
def stages(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, scores_differ: None) -> dict[str, Path]:
    made = dict(inputs)
    for name, step in STEPS.items():
        made[name] = tmp_path_factory.mktemp(name)
        step(CONFIG, made, made[name])
    return made


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The policy's LoRA in a folder."""
    return {name: w for name, w in load_file(folder / "policy.safetensors").items() if name.startswith(POLICY_LORA)}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def is_on(folder: Path) -> bool:
    return bool(read_json(folder / "vismem.json")["policy_lora"])


def test_the_warm_start_trains_it_and_the_rest_of_stage1_leaves_it(
    stages: dict[str, Path], inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the warm start prompts are read with gradient, and in GRPO, whose policy is frozen, without."""
    trained = adapter(stages["stage1"])
    assert all(value.any() for name, value in trained.items() if ".up." in name)
    assert is_on(stages["stage1"])
    gradients: dict[str, set[bool]] = {"warm start": set(), "grpo": set()}
    for phase, module in (("warm start", supervised), ("grpo", rollout)):
        read = module.prefill

        def reading(*arguments: Any, phase: str = phase, read: Any = read, **more: Any) -> Any:
            gradients[phase].add(torch.is_grad_enabled())
            return read(*arguments, **more)

        monkeypatch.setattr(module, "prefill", reading)
    more = CONFIG.model_copy(update={"stage1": CONFIG.stage1.model_copy(update={"steps": 4})})
    stage1(more, inputs, tmp_path)
    assert gradients == {"warm start": {True}, "grpo": {False}}
    assert equal(trained, adapter(tmp_path)), "GRPO, however long, does not move it"


@pytest.mark.parametrize("changes", [{"policy_lora": False}, {"steps": 0}])
def test_without_a_warm_start_that_trains_it_there_is_none(
    changes: dict[str, Any], inputs: dict[str, Path], tmp_path: Path
) -> None:
    stage1(warmed(**changes), inputs, tmp_path)
    assert not is_on(tmp_path)
    assert not any(value.any() for name, value in adapter(tmp_path).items() if ".up." in name)


def test_it_is_of_the_memorys_rank_and_alpha_on_q_proj_and_v_proj(stages: dict[str, Path]) -> None:
    memory, settings = CONFIG.memory, read_json(stages["stage1"] / "vismem.json")["policy_settings"]
    assert (settings["rank"], settings["alpha"]) == (memory.lora_rank, memory.lora_alpha)
    assert not settings["every_linear"]
    assert all("q_proj" in name or "v_proj" in name for name in adapter(stages["stage1"]))


def test_stage2_keeps_it_on_and_frozen_or_goes_on_training_it(stages: dict[str, Path], tmp_path: Path) -> None:
    trained = adapter(stages["stage1"])
    assert is_on(stages["stage2"])
    assert equal(trained, adapter(stages["stage2"]))
    settings = CONFIG.stage2.model_copy(update={"policy_lora": True, "policy_learning_rate": 1e-5, "steps": 1})
    stage2(CONFIG.model_copy(update={"stage2": settings}), stages, tmp_path)
    moved = {name: (value - trained[name]).abs().max() for name, value in adapter(tmp_path).items()}
    assert all(0 < distance < 1e-4 for distance in moved.values()), "it learns from where stage I left it"


def test_vanilla_is_answered_by_the_bare_base_and_all_other_arms_with_it(
    stages: dict[str, Path], inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[tuple[bool, bool]]] = {}
    for name, step in STEPS.items():

        def answering(model: VisMemModel, batch: Any, policy: Any, name: str = name, **more: Any) -> Any:
            seen.setdefault(name, set()).add((isinstance(policy, Off), policy.base))
            return generate(model, batch, policy, **more)

        monkeypatch.setattr(batches, "generate", answering)
        (tmp_path / name).mkdir()
        step(CONFIG, stages, tmp_path / name)
    assert seen == {"stage1": {(True, True), (False, False)}, "stage2": {(True, True), (False, False)}}


def test_the_vanilla_of_a_model_with_it_is_the_base_to_the_last_bit(stages: dict[str, Path], tiny_base: Path) -> None:
    model = VisMemModel.from_pretrained(stages["stage2"], tiny_base)
    plain = VisMemModel(load_base(tiny_base), CONFIG.memory, CONFIG.invocation)
    with model.policy_lora.active(False):
        ours = generate(model, tiny.samples(), Off(), max_new_tokens=8)
    theirs = generate(plain, tiny.samples(), Off(), max_new_tokens=8)
    assert [(r.token_ids, r.logprobs) for r in ours] == [(r.token_ids, r.logprobs) for r in theirs]
    with_reader = generate(model, tiny.samples(), Off(), max_new_tokens=8)
    assert [r.logprobs for r in with_reader] != [r.logprobs for r in theirs]
