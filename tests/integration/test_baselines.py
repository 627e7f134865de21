"""The baselines on a tiny model: what they change and leave alone; that they are saved, resumed and decoded."""

import csv
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from vismem.cli import build_parser
from vismem.config import BaselinesConfig, BaselinesGrpoConfig, Config, EvaluateConfig, GrpoConfig, SupervisedConfig
from vismem.data.sample import read_samples
from vismem.errors import UserError
from vismem.evaluation.arms import ARMS
from vismem.evaluation.decoding import decode
from vismem.evaluation.evaluate import load_models
from vismem.evaluation.predictions import read_predictions
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Off
from vismem.models.loading import load_base
from vismem.models.variants import load_variant
from vismem.models.vismem import VisMemModel
from vismem.records import VANILLA
from vismem.steps import BASELINES, STEPS, run_step
from vismem.training import baselines, loop
from vismem.training.baselines import PolicyGrpo, matched_lora
from vismem.training.run import FORMATION, POLICY_LORA, Run
from vismem.training.supervised import Supervised

NAMES = [step.name for step in BASELINES]
FROZEN = [name for name in NAMES if name != "full"]
LORAS = [name for name in NAMES if "lora" in name]
GRPO = GrpoConfig(batch_size=2, max_new_tokens=10, checkpoint_every=2)
STAGE = BaselinesGrpoConfig(steps=4, longer=1.5, group_size=4, learning_rate=1e-2)
SUPERVISED = SupervisedConfig(
    steps=6, longer=1.5, batch_size=4, learning_rate=1e-2, full_learning_rate=1e-3, warmup_ratio=0.2
)
CONFIG = Config(
    memory=tiny.MEMORY,
    grpo=GRPO,
    baselines=BaselinesConfig(rank=4, alpha=8, supervised=SUPERVISED, grpo=STAGE),
    evaluate=EvaluateConfig(arms=(VANILLA, "sft_lora", "full"), max_new_tokens=10, bootstrap=100),
)
pytestmark = pytest.mark.usefixtures("scores_differ")


@pytest.fixture(scope="module")
def inputs(tiny_base: Path, tiny_data: Path) -> dict[str, Path]:
    return {"base": tiny_base, "validate": tiny_data}


@pytest.fixture(scope="module")
def made(
    inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, scores_differ: None
) -> tuple[dict[str, Path], dict[str, VisMemModel]]:
    """Every baseline's folder, and the model as it was when training ended."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    models: dict[str, VisMemModel] = {}
    finish = Run.finish

    def keep(run: Run, *arguments: Any) -> str:
        models[run.name] = run.model
        return finish(run, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish", keep)
        for name in NAMES:
            assert run_step(name, CONFIG, artifacts, inputs).startswith(f"{name}: ")
    return {name: artifacts / name for name in NAMES}, models


Made = tuple[dict[str, Path], dict[str, VisMemModel]]


def answers(model: VisMemModel, policy: InvocationPolicy = Off()) -> list[tuple[int, ...]]:  # noqa: B008
    return [rollout.token_ids for rollout in generate(model, tiny.samples()[:6], policy, max_new_tokens=10)]


def changed(model: VisMemModel, base: Path) -> set[str]:
    """The names of the base's weights that are not as they were, to the last bit."""
    before, after = load_base(base).model.state_dict(), model.backbone.model.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_base_keeps_every_weight_bit_identical(made: Made, name: str, tiny_base: Path) -> None:
    assert changed(made[1][name], tiny_base) == set()


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_baseline_changes_every_part_of_its_adapter_and_nothing_of_vismem(made: Made, name: str) -> None:
    model = made[1][name]
    fresh = VisMemModel(model.backbone, CONFIG.memory, CONFIG.invocation, CONFIG.seed).state_dict()
    after = model.state_dict()
    own = {key for key in after if not key.startswith(POLICY_LORA)}
    assert [key for key in own if not torch.equal(after[key], fresh[key])] == []
    assert [key for key in set(after) - own if ".up." in key and not after[key].any()] == []


def test_full_fine_tuning_changes_the_language_model_and_leaves_vision_and_projector(
    made: Made, tiny_base: Path
) -> None:
    language = {
        name
        for name in load_base(tiny_base).model.state_dict()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    assert changed(made[1]["full"], tiny_base) == language


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("sft", "full"))])
def test_supervised_training_lowers_the_loss(made: Made, name: str) -> None:
    with (made[0][name] / f"{name}.csv").open() as lines:
        losses = [float(row["loss"]) for row in csv.DictReader(lines)]
    assert losses[-1] < losses[0]


def test_a_matched_lora_has_about_as_many_parameters_as_vismem_s_formation(made: Made) -> None:
    formation = sum(p.numel() for n, p in made[1]["sft_lora"].named_parameters() if n.startswith(FORMATION))
    for name in ("sft_lora_matched", "grpo_lora_matched"):
        figures = json.loads((made[0][name] / "metrics.json").read_text())
        assert figures["trainable_parameters"] == pytest.approx(formation, rel=0.05)
        assert made[1][name].policy_lora.settings.every_linear, "q_proj and v_proj are too narrow for so many"


def test_a_matched_lora_stands_on_q_and_v_where_they_are_wide_enough(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "FORMATION", ("short.",))
    model = tiny.vismem(tiny_base)
    settings = matched_lora(model, 2.0, 0.0)
    assert not settings.every_linear
    assert settings.alpha == 2.0 * settings.rank
    model.set_policy_lora(settings)
    wanted = sum(p.numel() for p in model.short.parameters())
    assert sum(p.numel() for p in model.policy_lora.parameters()) == pytest.approx(wanted, rel=0.05)


# --- saved, resumed, decoded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FROZEN)
def test_with_all_of_it_off_the_answers_are_the_base_s(made: Made, name: str, tiny_base: Path) -> None:
    model = load_variant(made[0][name], tiny_base)
    with model.policy_lora.active(False):
        assert answers(model) == answers(tiny.vismem(tiny_base))
    assert name.startswith("grpo") or answers(model, ARMS[name].policy) != answers(tiny.vismem(tiny_base))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_and_loaded_baseline_answers_as_the_trained_one(made: Made, name: str, inputs: dict[str, Path]) -> None:
    folders, models = made
    loaded = load_models([ARMS[name]], {**inputs, **folders}, CONFIG)
    assert answers(loaded[name], ARMS[name].policy) == answers(models[name], ARMS[name].policy)


@pytest.mark.parametrize(
    ("name", "objective"), [("sft_lora", Supervised), ("grpo_lora_matched", PolicyGrpo), ("full", Supervised)]
)
def test_a_killed_and_resumed_baseline_equals_an_unbroken_one(
    made: Made, name: str, objective: Any, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, calls = objective.collect, []

    def killed(self: Any, at: int) -> Any:
        calls.append(at)
        if calls == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return collect(self, at)

    monkeypatch.setattr(objective, "collect", killed)
    seconds = itertools.count().__next__  # one per step
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=seconds, monotonic=lambda: 0.0))
    with pytest.raises(KeyboardInterrupt):
        run_step(name, CONFIG, tmp_path, inputs)
    run_step(name, CONFIG, tmp_path, inputs)
    assert calls[:6] == [0, 1, 2, 3, 2, 3], "the second run resumes from the checkpoint after step 1"
    for file in made[0][name].glob("*.safetensors"):
        expected, resumed = load_file(file), load_file(tmp_path / name / file.name)
        assert expected.keys() == resumed.keys()
        assert [key for key in expected if not torch.equal(expected[key], resumed[key])] == []
    first, again = (json.loads((folder / "metrics.json").read_text()) for folder in (made[0][name], tmp_path / name))
    steps = calls[-1] + 1
    assert again.pop("train_seconds") == steps, "seconds of before the kill count, those of lost steps do not"
    del first["train_seconds"]
    assert first == again


@pytest.mark.parametrize("name", NAMES)
def test_metrics_say_what_training_took(made: Made, name: str) -> None:
    figures = json.loads((made[0][name] / "metrics.json").read_text())
    questions, rollouts = (4 * 2, 4 * 2 * 4) if name.startswith("grpo") else (6 * 4, 0)
    longer = 1.5 if name.endswith("_long") else 1
    assert (figures["train_samples"], figures["train_rollouts"]) == (longer * questions, longer * rollouts)
    assert figures["train_seconds"] > 0
    assert 0 <= figures["validation"][name]["score"] <= 100


def test_evaluate_decodes_every_arm_with_its_own_model(
    made: Made, inputs: dict[str, Path], tmp_path: Path, tiny_base: Path
) -> None:
    tiny.vismem(tiny_base).save_pretrained(tmp_path / "stage2")
    for name, folder in made[0].items():
        (tmp_path / name).symlink_to(folder)
    run_step("evaluate", CONFIG, tmp_path, inputs)
    samples = read_samples(inputs["validate"] / "data/test")
    texts = {}
    for name in ("sft_lora", "full"):
        alone = decode({name: made[1][name]}, [ARMS[name]], samples, CONFIG)[name].rollouts
        texts[name] = [
            prediction.text for prediction in read_predictions(tmp_path / f"evaluate/predictions/{name}.parquet")
        ]
        assert texts[name] == [rollout.text for rollout in alone]
    assert texts["sft_lora"] != texts["full"]


def test_an_arm_whose_model_is_not_there_names_the_step_to_run(inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"'grpo_lora'.* run `vismem grpo_lora`"):
        load_models([ARMS["grpo_lora"]], inputs, CONFIG)


def test_every_baseline_is_a_command_and_an_arm_and_no_step_of_the_pipeline() -> None:
    assert not set(NAMES) & {step.name for step in STEPS}
    for name in NAMES:
        assert build_parser().parse_args([name]).command == name
        assert ARMS[name].model == name
