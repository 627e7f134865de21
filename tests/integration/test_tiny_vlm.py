"""The recipe of the tiny VLM, for a few steps."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.tiny_vlm import objectives, train
from recipes.tiny_vlm.card import FACTS
from recipes.tiny_vlm.memory import memory_config, train_memory
from recipes.tiny_vlm.train import SHARES, Settings, train_last, train_longer, train_tiny_vlm
from vismem.config import GrpoConfig, Stage1Config, Stage2Config, WarmStartConfig
from vismem.errors import UserError
from vismem.files import read_json
from vismem.models.backbones.base import Backbone
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel
from vismem.provenance import file_hashes

SETTINGS = Settings(
    size=tiny.SIZE,
    questions=46,
    vision_steps=4,
    language_steps=4,
    detail_steps=4,
    compute_steps=4,
    more_steps=4,
    walks_steps=4,
    batch_size=4,
    checkpoint_every=2,
    scored=2,
)
PHASES = ("vision", *SHARES)
STEPS = sum(getattr(SETTINGS, f"{phase}_steps") for phase in PHASES)
SEED = 3
ORIGIN = {"command": "the command", "git": {"commit": "0123abc", "dirty": False}}


@pytest.fixture(scope="module", autouse=True)
def few_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "VISION_BATCH", 8)
        patch.setattr(train, "SIDES", (84, 140))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, few_images: None) -> Path:
    return train_tiny_vlm(tmp_path_factory.mktemp("recipe") / "made", SEED, SETTINGS, ORIGIN)


def test_each_phase_trains_its_own_part_and_lowers_its_loss(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, **{f"{phase}_steps": 30 for phase in PHASES})
    out = train_tiny_vlm(tmp_path / "made", SEED, settings, ORIGIN)
    losses = {}
    for phase in PHASES:
        lines = (out / f"{phase}.csv").read_text().splitlines()[1:]
        losses[phase] = [float(line.split(",")[1]) for line in lines]
        assert len(lines) == 30
        start = "compute" if phase in ("more", "walks") else phase  # which begin with what that phase has learnt
        assert losses[phase][-1] < 0.8 * losses[start][0]


def test_the_folder_opens_with_auto_classes_and_is_scored_and_complete(made: Path) -> None:
    assert type(AutoModelForImageTextToText.from_pretrained(made)).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(AutoProcessor.from_pretrained(made)).__name__ == "Qwen2_5_VLProcessor"
    facts = read_json(made / FACTS)
    assert set(facts["scores"]["sizes"]) == {"84 x 84", "140 x 140"}
    assert set(facts["scores"]["splits"]["validation"]) == {"coarse", "coarse, then whole", "whole"}
    assert facts["command"] == "the command"
    tiny.check_card(made)
    assert not list(made.glob("*.checkpoint"))
    assert [path.name for path in made.parent.iterdir()] == ["made"]


def test_the_same_seed_gives_the_same_files_and_another_seed_other_weights(made: Path, tmp_path: Path) -> None:
    again = train_tiny_vlm(tmp_path / "again", SEED, SETTINGS, ORIGIN)
    assert file_hashes(again) == file_hashes(made)
    other = train_tiny_vlm(tmp_path / "other", SEED + 1, SETTINGS, ORIGIN)
    assert file_hashes(other)["model.safetensors"] != file_hashes(made)["model.safetensors"]


@pytest.mark.parametrize("at", range(STEPS))
def test_a_run_killed_at_any_step_and_resumed_equals_the_one_that_was_not(
    at: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_or_die(*arguments: Any, **more: Any) -> Tensor:  # gradients are made, the weights not yet moved
        calls.append(len(calls))
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return clip(*arguments, **more)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_die)
    out = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        train_tiny_vlm(out, SEED, SETTINGS, ORIGIN)
    assert not out.exists()
    train_tiny_vlm(out, SEED, SETTINGS, ORIGIN)
    assert len(calls) - (at + 1) <= STEPS - at + 1, "it resumed from a checkpoint"
    assert file_hashes(out) == file_hashes(made)


def test_a_model_without_the_last_phase_learns_it_as_if_it_had_been_made_in_one_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train_tiny_vlm(tmp_path / "made", SEED, dataclasses.replace(SETTINGS, walks_steps=0), ORIGIN)
    first = read_json(out / FACTS)
    origin = {"command": "another", "git": {"commit": "4567def", "dirty": False}}
    with monkeypatch.context() as patch:
        patch.setattr(train, "score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_last(out, SEED, SETTINGS, origin)
    assert read_json(out / FACTS) == first, "until it is done the model of before stays"
    assert train_last(out, SEED, SETTINGS, origin) == out
    facts, whole = read_json(out / FACTS), read_json(made / FACTS)
    before = facts.pop("before")
    assert before == {name: first[name] for name in ("command", "git", "data_sha256")}
    assert facts == whole | origin
    for name in ("model.safetensors", *(f"{phase}.csv" for phase in PHASES)):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    assert "`another` from the weights of `the command` at commit 0123abc" in (out / "README.md").read_text()
    tiny.check_card(out)
    with pytest.raises(UserError, match="made has learnt its last phase, walks: --longer says"):
        train_last(out, SEED, SETTINGS, origin)


def test_what_more_steps_would_gain_is_noted_and_the_weights_stay(made: Path, tmp_path: Path) -> None:
    """The model that is scored last is the one that was trained on."""
    shutil.copytree(made, out := tmp_path / "made")
    trained = list[bool]()

    def scored(backbone: Backbone, pixels: int, count: int) -> dict[str, float]:
        trained.append(not torch.equal(backbone.head.weight, weights["lm_head.weight"]))
        return {"all": 50.0 + len(trained)}

    weights = {name: value.clone() for name, value in load_base(out).model.state_dict().items()}
    origin = {"command": "another", "git": {"commit": "4567def", "dirty": False}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "score_coarse", scored)
        assert train_longer(out, SEED, SETTINGS, origin) == out
    assert trained == [False, True]
    facts = read_json(out / FACTS)
    longer = facts["scores"].pop("longer")
    assert longer == {"questions": SETTINGS.compared, "before": {"all": 51.0}, "after": {"all": 52.0}, **origin}
    assert facts == read_json(made / FACTS)
    assert (out / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert "it goes from\n51.0 to 52.0 % of all on 4,000 fresh questions" in (out / "README.md").read_text()
    tiny.check_card(out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_killed_run_of_another_seed_is_not_resumed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("recipes.tiny_vlm.train.score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_tiny_vlm(tmp_path / "made", SEED + 1, SETTINGS, ORIGIN)
    out = train_tiny_vlm(tmp_path / "made", SEED, SETTINGS, ORIGIN)
    assert file_hashes(out) == file_hashes(made)


def test_a_memory_is_trained_on_it_by_the_library_s_own_steps(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.tiny_vlm.memory.VALIDATION", 13)
    config = memory_config(made, SEED)
    source = config.prepare.sources[0].model_copy(update={"train": 13})
    config = config.model_copy(
        update={
            "prepare": config.prepare.model_copy(update={"sources": (source,)}),
            "memory": tiny.MEMORY,
            "grpo": GrpoConfig(batch_size=2, max_new_tokens=4),
            "stage1": Stage1Config(steps=1, group_size=2, warm_start=WarmStartConfig(steps=1, batch_size=2)),
            "stage2": Stage2Config(steps=1, group_size=2),
        }
    )
    out = train_memory(tmp_path / "memory", made, config, ORIGIN)
    tiny.check_card(out)
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    assert read_json(out / FACTS)["questions"] == 13
    assert VisMemModel.from_pretrained(out, made).memory_config == tiny.MEMORY
