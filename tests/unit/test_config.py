"""Parameters: what is written in params.yaml, what a profile does to it, and what a mistake is told."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vismem.config import Config, JsonlSource, ScenesSource, Section, load_config, merge, parse_config, resolve
from vismem.config.section import is_rare
from vismem.errors import UserError
from vismem.kubeflow.cluster import load_cluster
from vismem.params_file import render_params

ROOT = Path(__file__).parents[2]


def test_params_yaml_holds_the_defaults_as_the_command_prints_them() -> None:
    text = (ROOT / "params.yaml").read_text()
    assert parse_config(yaml.safe_load(text)) == Config()
    assert text == render_params(Config()), "run `vismem params --defaults > params.yaml`"


def test_params_yaml_leaves_out_the_rare_keys_alone() -> None:
    def rare_keys(section: type[Section], place: str = "") -> set[str]:
        found = set()
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found |= rare_keys(field.annotation, f"{place}{field.alias or name}.")
            elif is_rare(field):
                found.add(f"{place}{name}")
        return found

    def keys(values: dict[str, Any], place: str = "") -> set[str]:
        nested = [keys(value, f"{place}{key}.") for key, value in values.items() if isinstance(value, dict) and value]
        return {f"{place}{key}" for key, value in values.items() if value == {} or not isinstance(value, dict)}.union(
            *nested
        )

    written = keys(yaml.safe_load((ROOT / "params.yaml").read_text()))
    every = keys(Config().model_dump(mode="json", by_alias=True))
    assert rare_keys(Config) == every - written
    assert "grpo.temperature" in rare_keys(Config)
    assert keys(yaml.safe_load(render_params(Config(), every=True))) == every, "`vismem params --all` shows all"


def test_a_rare_key_that_differs_from_its_default_is_written() -> None:
    config = parse_config({"grpo": {"temperature": 0.7}})
    text = render_params(config)
    assert "temperature: 0.7" in text
    assert "weight_decay" not in text
    assert parse_config(yaml.safe_load(text)) == config


def test_every_parameter_is_described() -> None:
    def undescribed(section: Any, place: str) -> list[str]:
        found = []
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if hasattr(value, "model_fields"):
                found += undescribed(value, f"{place}.{name}")
            elif not field.description and name not in ("kind", "split", "sources"):
                found.append(f"{place}.{name}")
        return found

    assert undescribed(Config(), "") == []


def test_what_is_rendered_reads_back_unchanged() -> None:
    config = parse_config(
        {
            "seed": 7,
            "prepare": {
                "sources": [{"kind": "jsonl", "path": "a b/c: d.jsonl", "split": "test"}, {"kind": "easy_vqa"}]
            },
            "invocation": {"delimiters": ["\n", "#", "é", "'"]},
            "validate": {"task_profile": "mix.json"},
            "grpo": {"weight_decay": 0.1},
            "stage1": {"learning_rate": 1e-7},
        }
    )
    for every in (False, True):
        assert parse_config(yaml.safe_load(render_params(config, every))) == config


def test_a_profile_overlays_key_by_key_and_replaces_lists_whole(tmp_path: Path) -> None:
    (tmp_path / "deploy" / "profiles").mkdir(parents=True)
    (tmp_path / "params.yaml").write_text("seed: 3\nmemory: {queries: 4, lora_rank: 2}\nevaluate: {arms: [a, b, c]}\n")
    (tmp_path / "deploy" / "profiles" / "tiny.yaml").write_text("memory: {queries: 1}\nevaluate: {arms: [a]}\n")
    config = load_config(tmp_path / "params.yaml", "tiny")
    assert (config.seed, config.memory.queries, config.memory.lora_rank) == (3, 1, 2)
    assert config.evaluate.arms == ("a",)


def test_a_profile_lies_over_the_one_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "deploy" / "profiles").mkdir(parents=True)
    (tmp_path / "params.yaml").write_text("seed: 3\nmemory: {queries: 4, lora_rank: 2}\n")
    profiles = {
        "large": "memory: {queries: 1, short_length: 5}\nevaluate: {arms: [a]}\n",
        "larger": "extends: large\nmemory: {queries: 2}\n",
        "largest": "extends: larger\n",
        "odd": "extends: lage\n",
    }
    for name, text in profiles.items():
        (tmp_path / "deploy" / "profiles" / f"{name}.yaml").write_text(text)
    config = load_config(tmp_path / "params.yaml", "larger")
    memory = config.memory
    assert (config.seed, memory.queries, memory.short_length, memory.lora_rank) == (3, 2, 5, 2)
    assert config.evaluate.arms == ("a",)
    with pytest.raises(UserError, match=r"'largest' extends 'larger', which extends 'large': name that one"):
        load_config(tmp_path / "params.yaml", "largest")
    with pytest.raises(UserError, match=r"unknown profile 'lage' \(did you mean 'large'\?\)"):
        load_config(tmp_path / "params.yaml", "odd")


def test_what_a_section_leaves_out_has_the_default_of_that_place() -> None:
    """The defaults of a section are those of its type, wherever it stands: a file need not name every key."""

    def check(section: Section) -> None:
        assert type(section)() == section
        for _, value in section:
            if isinstance(value, Section):
                check(value)

    check(Config())


def test_the_defaults_hold_where_the_working_folder_has_no_params_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_config(ROOT / "params.yaml", "smoke")
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("params.yaml")) == Config()
    assert load_config(Path("params.yaml"), "smoke") == resolve("smoke") == expected


def test_a_profile_of_the_project_hides_the_shipped_one_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deploy" / "profiles").mkdir(parents=True)
    (tmp_path / "deploy" / "profiles" / "smoke.yaml").write_text("seed: 41\n")
    (tmp_path / "params.yaml").write_text("memory: {queries: 3}\n")
    monkeypatch.chdir(tmp_path)
    own = load_config(Path("params.yaml"), "smoke")
    assert (own.seed, own.memory.queries, own.stage1) == (41, 3, Config().stage1)
    assert load_config(Path("params.yaml"), "internvl3_5_8b").memory.queries == 3
    assert resolve("smoke").seed == 41


def test_a_key_that_is_no_text_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown key 'stage1\.1'"):
        resolve(overrides={"stage1": {1: 2}})


def test_merge_changes_neither_side() -> None:
    below, above = {"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}, "d": None}
    assert merge(below, above) == {"a": {"b": 1, "c": [3]}, "d": None}
    assert (below, above) == ({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}, "d": None})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage1": {"learning_rat": 1.0}}, "unknown key 'stage1.learning_rat' (did you mean 'stage1.learning_rate'?)"),
        ({"stage2": {"temperature": 0.5}}, "unknown key 'stage2.temperature'"),
        ({"stage3": {}}, "unknown key 'stage3' (did you mean 'stage"),
        ({"evalute": {}}, "unknown key 'evalute' (did you mean 'evaluate'?)"),
        (
            {"stage1": {"warm_start": {"step": 3}}},
            "unknown key 'stage1.warm_start.step' (did you mean 'stage1.warm_start.steps'?)",
        ),
        ({"prepare": {"sources": [{"kind": "scenes", "trian": 3}]}}, "(did you mean 'prepare.sources.0.train'?)"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({"seed": "many"}, "'seed': Input should be a valid integer"),
        ({"memory": {"queries": 0}}, "'memory.queries': Input should be greater than or equal to 1 (got 0)"),
        ({"memory": 3}, "'memory': "),
        ({"seed": 2**32}, "'seed': Input should be less than 4294967296"),
        ({"stage1": {"learning_rate": float("inf")}}, "'stage1.learning_rate': Input should be a finite number"),
        ({"gate": {"min_gain": float("nan")}}, "'gate.min_gain': Input should be a finite number"),
        ({"invocation": {"delimiters": [".", ""]}}, "'invocation.delimiters.1': String should have at least 1 char"),
        ({"base": {"dtype": "float8"}}, "'base.dtype': Input should be 'float32' or 'bfloat16' (got 'float8')"),
        ({"prepare": {"sources": [{"kind": "csv"}]}}, "'csv'"),
        ({"prepare": {"sources": [{"kind": "jsonl", "split": "test"}]}}, "'prepare.sources.0.path': Field required"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_nearest_right_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(values, "mine.yaml")
    assert str(error.value).startswith("mine.yaml: ")
    assert message in str(error.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError, match=r"'seed'.*'gate\.min_gian'"):
        parse_config({"seed": -1, "gate": {"min_gian": 1}})


def test_an_unknown_profile_names_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match=r"unknown profile 'smok' \(did you mean 'smoke'\?\).*qwen2_5_vl_7b, smoke"):
        load_config(ROOT / "params.yaml", "smok")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no parameter file"), (b"a: [1", "is not valid YAML"), (b"- 1\n- 2\n", "must hold a mapping"),
     (b"# caf\xe9", "is not valid YAML: 'utf-8' codec")],
)  # fmt: skip
def test_a_file_that_is_no_parameter_file_is_refused(tmp_path: Path, text: bytes | None, message: str) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_what_pods_tolerate_and_which_nodes_they_take_may_stand_in_a_profile() -> None:
    pods = {"node_selector": {"gpu": "h100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
    cluster = load_cluster(parse_config({"cluster": pods}).cluster)
    assert cluster.node_selector == {"gpu": "h100"}
    assert cluster.tolerations == ({"key": "gpu", "operator": "Exists"},)


def test_sources_keep_their_kinds() -> None:
    given = [{"kind": "scenes", "train": 5}, {"kind": "jsonl", "path": "x.jsonl", "split": "test", "limit": 2}]
    config = parse_config({"prepare": {"sources": given}})
    assert config.prepare.sources == (
        ScenesSource(train=5),
        JsonlSource(kind="jsonl", path="x.jsonl", split="test", limit=2),
    )
