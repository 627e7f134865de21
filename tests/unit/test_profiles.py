"""The profiles: each lists only what it changes, compared with what it extends; 7B models get the paper's numbers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vismem.config import SOURCES, Config, GrpoConfig, Section, load_config
from vismem.evaluation.arms import resolve_arms
from vismem.init.profile import MARK
from vismem.models.backbones import FAMILIES

ROOT = Path(__file__).parents[2]
ALL = {path.stem: path for path in sorted((ROOT / "deploy" / "profiles").glob("*.yaml"))}
FILES = {name: path for name, path in ALL.items() if not path.read_text().startswith(MARK)}  # not a user's own
PAPER = {
    "internvl3_5_8b": ("OpenGVLab/InternVL3_5-8B-HF", "internvl"),
    "llava_onevision_7b": ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision"),
    "qwen2_5_vl_7b": ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl"),
}


def repeated(profile: dict[str, Any], defaults: dict[str, Any], place: str = "") -> Iterator[str]:
    """The keys of a profile whose value is the default's; sources are compared with their kind's defaults."""
    for key, value in profile.items():
        here = f"{place}{key}"
        if here == "prepare.sources":
            for source in value:
                fields = SOURCES[source["kind"]].model_fields
                plain = {name: fields[name].default for name in source if name != "kind"}
                yield from repeated({name: source[name] for name in plain}, plain, f"{here}.{source['kind']}.")
        elif key == "cluster":  # no section: parameters of the pipeline
            assert value != defaults[key]
        elif isinstance(value, dict):
            yield from repeated(value, defaults[key], f"{here}.")
        elif value == defaults[key]:
            yield here


@pytest.mark.parametrize("name", FILES)
def test_every_profile_reads_and_lists_only_what_differs_from_the_defaults(name: str) -> None:
    config = load_config(ROOT / "params.yaml", name)  # unknown keys are errors
    assert config != load_config(ROOT / "params.yaml")
    resolve_arms(config.evaluate.arms)
    profile = yaml.safe_load(FILES[name].read_text())
    below = load_config(ROOT / "params.yaml", profile.pop("extends", None))
    assert list(repeated(profile, below.model_dump(mode="json", by_alias=True))) == []


def test_a_value_that_repeats_the_default_is_noticed() -> None:
    defaults = Config().model_dump(mode="json", by_alias=True)
    profile = {
        "seed": 1,
        "memory": {"queries": 8, "lora_rank": 4},
        "stage1": {"warm_start": {"batch_size": 32}},
        "prepare": {"sources": [{"kind": "scenes", "image_size": 168, "train": 5}]},
    }
    found = ["memory.queries", "stage1.warm_start.batch_size", "prepare.sources.scenes.image_size"]
    assert list(repeated(profile, defaults)) == found


def test_there_is_a_profile_for_every_family_and_a_toy_one() -> None:
    assert set(FILES) >= {"smoke", *PAPER}
    assert {family for _, family in PAPER.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", PAPER)
def test_the_profiles_of_large_models_hold_the_paper_s_numbers(name: str) -> None:
    config = load_config(ROOT / "params.yaml", name)
    assert (config.base.model, config.base.dtype) == (PAPER[name][0], "bfloat16")
    memory = config.memory
    assert (memory.queries, memory.short_length, memory.long_length) == (8, 8, 16)
    assert (memory.lora_rank, memory.lora_alpha) == (16, 32)
    for stage, rate, warmup, beta, target in (
        (config.stage1, 5e-5, 0.2, 0.015, 0.03),
        (config.stage2, 1e-5, 0.1, 0.030, 0.05),
    ):
        assert (stage.group_size, stage.steps, stage.learning_rate, stage.warmup_ratio) == (16, 0, rate, warmup)
        assert (stage.kl_coefficient, stage.target_kl) == (beta, target)
    grpo = config.grpo
    assert (grpo.batch_size, grpo.epochs, grpo.updates) == (8, 2, 1)
    assert (grpo.clip_low, grpo.clip_high, grpo.normalise_by_std) == (0.2, 0.2, True)
    assert (config.stage1.warm_start.steps, config.stage2.penalty) == (0, 0.3)
    assert config.stage2.policy_learning_rate == 1e-5


def differences(section: Section, place: str = "") -> Iterator[str]:
    """The keys whose value is not the paper's: "[paper ...: value]" in a description, or the default of a "[paper]"."""
    for key, field in section.by_key().items():
        value = getattr(section, "validate_" if key == "validate" else key)
        if isinstance(value, Section):
            yield from differences(value, f"{place}{key}.")
        elif found := re.search(r"\[paper[^\]:]*(?:: ([^\]]+))?\]", field.description or ""):
            paper = field.default if found[1] is None else yaml.safe_load(found[1])
            if str(value) != str(paper) and not _same_number(value, paper):
                yield f"{place}{key}"


def _same_number(value: Any, paper: Any) -> bool:
    try:
        return float(value) == float(paper)
    except ValueError:
        return False


@pytest.mark.parametrize("name", PAPER)
def test_the_profiles_of_large_models_name_every_difference_from_the_paper(name: str) -> None:
    lines = [line for file in {name, "qwen2_5_vl_7b"} for line in FILES[file].read_text().splitlines()]
    comments = "\n".join(line.partition("#")[2] for line in lines)
    found = list(differences(load_config(ROOT / "params.yaml", name)))
    assert {"memory.short_init", "memory.lora_dropout", "invocation.max_per_answer"} <= set(found)
    assert [key for key in found if key not in comments] == []


def test_a_value_that_is_not_the_paper_s_is_noticed() -> None:
    assert list(differences(Config(grpo=GrpoConfig(batch_size=9, updates=2)).grpo)) == [
        "batch_size", "updates", "loss_type"
    ]  # fmt: skip
    assert list(differences(Config().stage1, "stage1.")) == [
        "stage1.learning_rate", "stage1.warm_start.steps"
    ]  # fmt: skip


def test_the_profiles_of_large_models_differ_in_names_only() -> None:
    def nameless(name: str) -> str:
        values = load_config(ROOT / "params.yaml", name).model_dump_json().replace(PAPER[name][0], "MODEL")
        return values.replace(name, "NAME")

    assert len({nameless(name) for name in PAPER}) == 1
