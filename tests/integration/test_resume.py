"""Both stages, and baselines, killed at any step and resumed, and repeated from the same seed: the same files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from vismem.config import (
    BaselinesConfig,
    BaselinesGrpoConfig,
    Config,
    GrpoConfig,
    Stage1Config,
    Stage2Config,
    SupervisedConfig,
    WarmStartConfig,
)
from vismem.steps import BY_NAME
from vismem.training.stage1 import stage1
from vismem.training.stage2 import stage2

STAGE: dict[str, Any] = {"group_size": 4, "learning_rate": 1e-2}
CONFIG = Config(
    memory=tiny.MEMORY.model_copy(update={"lora_dropout": 0.1}),  # so that a draw that is not the step's own would show
    grpo=GrpoConfig(batch_size=2, max_new_tokens=8, checkpoint_every=2),
    stage1=Stage1Config(steps=3, warm_start=WarmStartConfig(steps=3, batch_size=4), **STAGE),
    stage2=Stage2Config(steps=4, **STAGE),
    baselines=BaselinesConfig(
        rank=4,
        alpha=8,
        dropout=0.1,
        supervised=SupervisedConfig(steps=3, batch_size=4),
        grpo=BaselinesGrpoConfig(steps=3, **STAGE),
    ),
)
BASELINES = ("static_prefix", "continuous", "sft_lora_vision", "grpo_lora_vision")
PAPERS = CONFIG.stage2.model_copy(update={"whitened_learning_rate": 0.0, "best_words": False, "policy_lora": True})


def papers(_: Config, inputs: dict[str, Path], out: Path) -> str:
    """Stage II by the paper, with the LoRA: the head's rows step as the others do, and words are drawn."""
    return stage2(CONFIG.model_copy(update={"stage2": PAPERS}), inputs, out)


STEPS: dict[str, Callable[..., str]] = {
    "stage1": stage1,
    "stage2": stage2,
    "papers": papers,
    **{name: BY_NAME[name].load() for name in BASELINES},
}
pytestmark = pytest.mark.usefixtures("scores_differ")


@pytest.fixture(scope="module")
def unbroken(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, scores_differ: None) -> dict[str, Path]:
    inputs = {"base": tiny_base, "validate": tiny.save_data(tmp_path_factory.mktemp("validate"), count=4)}
    for name, step in STEPS.items():
        inputs[name] = tmp_path_factory.mktemp(name)
        step(CONFIG, inputs, inputs[name])
    return inputs


def contents(folder: Path) -> dict[str, bytes]:
    """All files by name, but for the seconds that a run took."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: re.sub(rb'"\w*seconds": [0-9.]+', b"", data) for name, data in files.items()}


def test_the_same_seed_gives_the_same_files(unbroken: dict[str, Path], tmp_path: Path) -> None:
    for name, step in STEPS.items():
        out = tmp_path / name
        out.mkdir()
        step(CONFIG, unbroken, out)
        assert contents(out) == contents(unbroken[name]), name


KILLS = [
    (name, at)
    for name, steps in (("stage1", 6), ("stage2", 4), ("papers", 4), *((name, 3) for name in BASELINES))
    for at in range(steps)
]


@pytest.mark.parametrize(("name", "at"), KILLS)
def test_a_run_killed_at_any_step_and_resumed_equals_the_one_that_was_not(
    name: str, at: int, unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_or_die(*arguments: Any, **more: Any) -> Tensor:  # gradients are made, the weights not yet moved
        calls.append(len(calls))
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return clip(*arguments, **more)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_die)
    with pytest.raises(KeyboardInterrupt):
        STEPS[name](CONFIG, unbroken, tmp_path)
    STEPS[name](CONFIG, unbroken, tmp_path)
    again = len(calls) - (at + 1)
    assert again <= len([kill for kill in KILLS if kill[0] == name]) - at + 1, "it resumed from a checkpoint"
    assert contents(tmp_path) == contents(unbroken[name])


def test_stage2_is_resumed_against_the_reference_that_it_began_with(
    unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another GPU would fit other rows; here none are fitted."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stage2(CONFIG, unbroken, tmp_path)
    monkeypatch.setattr("vismem.training.stage2.fit_invocation", lambda *_: 1 / 0)
    stage2(CONFIG, unbroken, tmp_path)
    assert contents(tmp_path) == contents(unbroken["stage2"])


@pytest.mark.parametrize("name", STEPS)
def test_a_run_killed_while_it_writes_a_checkpoint_or_its_result_resumes_as_if_never_killed(
    name: str, unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: Any, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half a fi")
        raise KeyboardInterrupt

    for place in ("vismem.training.checkpoint.save_file", "vismem.models.vismem.save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(place, half)
            with pytest.raises(KeyboardInterrupt):
                STEPS[name](CONFIG, unbroken, tmp_path)
    STEPS[name](CONFIG, unbroken, tmp_path)
    found = contents(tmp_path)
    assert {file: data for file, data in found.items() if not file.endswith(".new")} == contents(unbroken[name])
