"""Continuing from an earlier memory, or an earlier LoRA: training starts from its weights."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from vismem import steps
from vismem.config import (
    BaselinesConfig,
    BaselinesGrpoConfig,
    Config,
    GrpoConfig,
    Stage1Config,
    Stage2Config,
    parse_config,
)
from vismem.config import SupervisedConfig as Sft
from vismem.config import WarmStartConfig as Warm
from vismem.data.sample import write_shards
from vismem.errors import UserError
from vismem.files import read_json, write_json
from vismem.kubeflow.parameters import IDENTITY, parameters_of
from vismem.steps import run_step
from vismem.training import loop
from vismem.training.run import Run

STAGE: dict[str, Any] = {"steps": 3, "group_size": 4, "learning_rate": 1e-2}
CONFIG = Config(
    memory=tiny.MEMORY,
    grpo=GrpoConfig(batch_size=2, max_new_tokens=8, checkpoint_every=1),
    stage1=Stage1Config(warm_start=Warm(steps=2, batch_size=4), **STAGE),
    stage2=Stage2Config(**STAGE),
    baselines=BaselinesConfig(
        rank=4, alpha=8, supervised=Sft(steps=3, batch_size=4), grpo=BaselinesGrpoConfig(**STAGE)
    ),
)
NAMES = ("stage1", "sft_lora", "grpo_lora")
pytestmark = pytest.mark.usefixtures("scores_differ")


@pytest.fixture(scope="module")
def inputs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"base": tiny_base, "validate": tiny.save_data(tmp_path_factory.mktemp("validate"), count=4)}


@pytest.fixture(scope="module")
def earlier(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, scores_differ: None) -> Path:
    artifacts = tmp_path_factory.mktemp("earlier")
    for name in NAMES:
        run_step(name, CONFIG, artifacts, inputs)
    run_step("stage2", CONFIG, artifacts, {**inputs, "stage1": artifacts / "stage1"})
    return artifacts


def continued(name: str, folder: Path) -> Config:
    """The parameters of a step that continues from `folder`, with other questions first."""
    section = "stage1" if name == "stage1" else "baselines"
    changed = getattr(CONFIG, section).model_copy(update={"start_from": folder})
    return CONFIG.model_copy(update={section: changed, "seed": 5})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "memory.safetensors") | load_file(folder / "policy.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_training_starts_from_the_weights_of_the_folder(
    name: str, earlier: Path, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    train = loop.train

    def looking(objective: Any, parameters: Any, *arguments: Any) -> Any:
        seen.append({key: value.detach().clone() for key, value in objective.model.state_dict().items()})
        return train(objective, parameters, *arguments)

    monkeypatch.setattr("vismem.training.run.train", looking)
    run_step(name, continued(name, earlier / name), tmp_path, inputs)
    before = weights(earlier / name)
    start = {key: value for key, value in before.items() if name == "stage1" or key.startswith("policy_lora.")}
    assert all(torch.equal(value, seen[0][key]) for key, value in start.items())
    after = weights(tmp_path / name)
    assert any(not torch.equal(value, after[key]) for key, value in before.items())
    assert read_json(tmp_path / name / "vismem.json")["policy_lora"]


@pytest.mark.parametrize("left_by", ["stage1", "stage2"])
def test_stage_ii_goes_on_with_the_rows_of_an_earlier_one_and_fits_fresh_ones(
    left_by: str, earlier: Path, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitted anew to the prior, the model would have forgotten when to invoke. Whitened rows are there and back."""
    began: list[torch.Tensor] = []
    monkeypatch.setattr(Run, "train_grpo", lambda run, *_, **__: began.append(run.model.tokens.head.detach().clone()))
    monkeypatch.setattr(Run, "finish", lambda run, *_: "")
    folders = {**inputs, "stage1": earlier / left_by}
    for rate, same in ((0.0, torch.equal), (0.03, partial(torch.allclose, atol=1e-5))):
        stage = CONFIG.stage2.model_copy(update={"whitened_learning_rate": rate})
        run_step("stage2", CONFIG.model_copy(update={"stage2": stage}), tmp_path, folders)
        assert same(began.pop(), weights(earlier / left_by)["tokens.head"]) == (left_by == "stage2")


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_continuation_resumes_exactly(
    name: str, earlier: Path, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, clip, calls = continued(name, earlier / name), torch.nn.utils.clip_grad_norm_, []
    run_step(name, config, tmp_path / "whole", inputs)

    def clip_or_die(*arguments: Any, **more: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return clip(*arguments, **more)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_die)
    with pytest.raises(KeyboardInterrupt):
        run_step(name, config, tmp_path / "killed", inputs)
    run_step(name, config, tmp_path / "killed", inputs)
    whole, resumed = weights(tmp_path / "whole" / name), weights(tmp_path / "killed" / name)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_whose_content_changed_makes_another_step(name: str, tmp_path: Path) -> None:
    (tmp_path / "policy.safetensors").write_bytes(b"one")
    config = continued(name, tmp_path)
    first = steps.identity(name, config, {})
    assert steps.identity(name, config, {}) == first
    (tmp_path / "policy.safetensors").write_bytes(b"two")
    assert steps.identity(name, config, {}) != first


def test_a_memory_of_another_size_family_or_tokenizer_is_refused(
    earlier: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    saved = read_json(earlier / "stage1" / "vismem.json")
    cases = {
        r"set memory\.long_length 7": {"memory": saved["memory"] | {"long_length": 7}},
        "trained on internvl": {"family": "internvl"},
        "another tokenizer": {"memory_ids": [1, 2, 3, 4]},
    }
    for message, change in cases.items():
        write_json(tmp_path / "vismem.json", saved | change)
        with pytest.raises(UserError, match=message):
            run_step("stage1", continued("stage1", tmp_path), tmp_path / "out", inputs)
    with pytest.raises(UserError, match="give a folder that stage1, stage2 or export wrote"):
        run_step("stage1", continued("stage1", tmp_path / "none"), tmp_path / "out", inputs)


def test_a_lora_of_another_size_or_none_is_refused(earlier: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    saved = read_json(earlier / "sft_lora" / "vismem.json")
    for change in ({"policy_settings": saved["policy_settings"] | {"rank": 2}}, {"policy_lora": False}):
        write_json(tmp_path / "vismem.json", saved | change)
        with pytest.raises(UserError, match="no LoRA of this size"):
            run_step("sft_lora", continued("sft_lora", tmp_path), tmp_path / "out", inputs)
    with pytest.raises(UserError, match=r"set base\.model"):
        run_step("full", continued("full", tmp_path), tmp_path / "out", inputs)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def changed(file: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    save_file({name: change(value).contiguous() for name, value in load_file(file).items()}, file)


def lacking(file: Path) -> None:
    save_file(dict([*load_file(file).items()][1:]), file)


def told(file: Path, *left_out: str, **told: Any) -> None:
    saved = {name: value for name, value in read_json(file).items() if name not in left_out}
    write_json(file, saved | told)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    r"memory\.safetensors is damaged": ("stage1", lambda folder: cut(folder / "memory.safetensors")),
    r"policy\.safetensors is damaged": ("sft_lora", lambda folder: cut(folder / "policy.safetensors")),
    "do not fit, it was trained on another base: size mismatch": (
        "stage1",
        lambda folder: changed(folder / "memory.safetensors", lambda value: value.repeat([2] * max(1, value.ndim))),
    ),
    "do not fit, .*: size": (
        "sft_lora",
        lambda folder: changed(folder / "policy.safetensors", lambda value: value.repeat([2] * max(1, value.ndim))),
    ),
    "do not fit, .*: Missing key": ("stage1", lambda folder: lacking(folder / "memory.safetensors")),
    "do not fit, .*: Missing": ("sft_lora", lambda folder: lacking(folder / "policy.safetensors")),
    "it lacks family, memory: give a folder": (
        "stage1",
        lambda folder: told(folder / "vismem.json", "family", "memory"),
    ),
    "it lacks family, format": ("stage1", lambda folder: write_json(folder / "vismem.json", ["no settings"])),
    "another memory than params.yaml: set memory.queries 5": (
        "stage1",
        lambda folder: told(folder / "vismem.json", memory=tiny.MEMORY.model_dump(mode="json") | {"queries": 5}),
    ),
    "is damaged, or of a later release .*later": (
        "stage1",
        lambda folder: told(folder / "vismem.json", memory=tiny.MEMORY.model_dump(mode="json") | {"later": 1}),
    ),
    "no LoRA of this size": (
        "sft_lora",
        lambda folder: told(
            folder / "vismem.json", policy_settings={"rank": 4, "alpha": 8, "dropout": 0, "vision": True}
        ),
    ),
    "step 0 made weights that are infinite or no numbers": (
        "stage1",
        lambda folder: changed(folder / "memory.safetensors", lambda value: value * torch.nan),
    ),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_folder_that_is_damaged_or_of_another_base_is_refused_in_one_line(
    said: str, earlier: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    name, damage = DAMAGES[said]
    folder = shutil.copytree(earlier / name, tmp_path / "start")
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        run_step(name, continued(name, folder), tmp_path, inputs)
    assert "\n" not in str(caught.value)


def test_training_without_questions_to_check_by_is_refused_before_it_begins(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    data = shutil.copytree(inputs["validate"], tmp_path / "validate")
    shutil.rmtree(data / "data" / "validation")
    write_shards([], data / "data" / "validation")
    for name in NAMES:
        with pytest.raises(UserError, match="validation has no rows: name sources with a validation split"):
            run_step(name, CONFIG, tmp_path, {**inputs, "validate": data})
        assert not [*tmp_path.glob("*.partial/*")]


@pytest.mark.parametrize("name", ["full", "static_prefix", "continuous"])
def test_a_baseline_that_has_no_lora_starts_from_none(name: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} has no LoRA to start from"):
        run_step(name, continued(name, tmp_path), tmp_path, inputs)


def test_a_base_of_no_numbers_ends_training_in_one_line(inputs: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(inputs["base"], tmp_path / "base")
    changed(base / "model.safetensors", lambda value: value * torch.nan)
    for name in NAMES:
        with pytest.raises(UserError, match="made weights that are infinite or no numbers"):
            run_step(name, CONFIG, tmp_path, {**inputs, "base": base})


@pytest.mark.parametrize(("step", "section"), [("base", {"model": ""}), ("stage1", {"start_from": ""})])
def test_a_given_model_that_changes_in_its_folder_changes_what_its_step_is_cached_by(
    tmp_path: Path, step: str, section: dict[str, str]
) -> None:
    config = parse_config({step: dict.fromkeys(section, str(tmp_path))})
    others, keys = [task for task in ("prepare", "stage2") if task != step], []
    for weights in ("old", "old", "newer"):
        if not keys or weights != "old":
            (tmp_path / "memory.safetensors").write_text(weights)
        keys.append(parameters_of(step, config)[IDENTITY])
        unchanged = [parameters_of(task, config)[IDENTITY] for task in others]
    assert keys[0] == keys[1] != keys[2]
    assert unchanged == [parameters_of(task, parse_config({}))[IDENTITY] for task in others]
