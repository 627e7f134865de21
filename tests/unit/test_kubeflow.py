"""Around the steps: parameters from a profile and overrides, what a cache may know, the summary, a task's output."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from project import scores

from vismem.config import SOURCES, Config, JsonlSource, PrepareConfig, Section, load_config, parse_config, resolve
from vismem.errors import UserError
from vismem.kubeflow.parameters import (
    IDENTITY,
    TASKS,
    code_fingerprint,
    configure,
    parameters_of,
    sources_fingerprint,
)
from vismem.kubeflow.results import describe, render_report, write_confusion, write_summary
from vismem.kubeflow.task import run_task
from vismem.provenance import origin_tags
from vismem.records import Release
from vismem.steps import BY_NAME, STEPS

ROOT = Path(__file__).parents[2]

# --- a profile and overrides ------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the profile `small`."""
    (tmp_path / "deploy" / "profiles").mkdir(parents=True)
    profile = "stage1: {steps: 5, warm_start: {steps: 6}}\nseed: 3\nevaluate: {limit: 9}\n"
    (tmp_path / "deploy" / "profiles" / "small.yaml").write_text(profile)
    return tmp_path


def test_overrides_win_over_the_profile_and_the_profile_over_the_defaults(root: Path) -> None:
    config = resolve("small", {"stage1.steps": 9, "stage1.warm_start.batch_size": 1}, root)
    assert (config.stage1.steps, config.stage1.warm_start.batch_size, config.stage1.warm_start.steps) == (9, 1, 6)
    assert config.seed == 3
    assert config.stage2 == Config().stage2


def test_an_override_can_set_the_default_or_null_against_a_profile(root: Path) -> None:
    usual = Config().stage1.steps
    assert resolve("small", {"stage1.steps": usual, "evaluate.limit": None}, root).stage1.steps == usual
    assert resolve("small", {"evaluate": {"limit": None}}, root).evaluate.limit is None


def test_dotted_keys_and_nested_sections_are_the_same_and_can_be_mixed(root: Path) -> None:
    nested = {"stage1": {"steps": 9, "warm_start": {"batch_size": 1}}, "seed": 4}
    assert resolve("small", nested, root) == resolve(
        "small", {"stage1.steps": 9, "stage1.warm_start.batch_size": 1, "seed": 4}, root
    )
    mixed = {"stage1": {"warm_start.batch_size": 1}, "stage1.steps": 9, "seed": 4}
    assert resolve("small", nested, root) == resolve("small", mixed, root)


def test_overrides_may_hold_all_of_params_yaml() -> None:
    everything = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert resolve("", everything) == load_config(ROOT / "params.yaml")


def test_nothing_given_is_the_defaults_also_where_all_numbers_became_floats() -> None:
    assert resolve() == Config()
    values = Config().model_dump(mode="json", by_alias=True, exclude_none=True)
    assert resolve("", json.loads(json.dumps(values), parse_int=float)) == Config()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stage1": {"stepz": 3}}, r"overrides: unknown key 'stage1.stepz' \(did you mean 'stage1.steps'\?\)"),
        ({"stage1.stepz": 3}, r"overrides: unknown key 'stage1.stepz' \(did you mean 'stage1.steps'\?\)"),
        ({"stage7": {}}, "overrides: unknown key 'stage7'"),
        ({"stage1.steps.more": 3}, r"overrides: 'stage1.steps': Input should be a valid integer \(got {'more': 3}\)"),
        ({"seed": "many"}, "overrides: 'seed': Input should be a valid integer"),
    ],
)
def test_a_mistake_is_named_with_its_place(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve("", overrides)


def test_an_unknown_profile_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown profile 'smok' \(did you mean 'smoke'\?\)"):
        resolve("smok")


# --- what each task gets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_task_s_parameters_hold_its_step_s_sections_and_none_of_later_steps(step) -> None:
    given = parameters_of(step.name, Config())
    assert set(step.sections) <= set(given)
    later = {name for other in STEPS[STEPS.index(step) + 1 :] for name in other.sections} - set(step.sections)
    if step.name in ("prepare", "validate", "base", "stage1", "stage2", "evaluate"):
        earlier = {name for other in STEPS[: STEPS.index(step)] for name in other.sections}
        assert not (later - earlier) & set(given)


def test_a_change_of_a_later_step_leaves_the_parameters_of_earlier_ones_as_they_were() -> None:
    def unchanged(overrides: dict[str, Any]) -> list[str]:
        config = resolve("", overrides)
        return [step.name for step in STEPS if parameters_of(step.name, Config()) == parameters_of(step.name, config)]

    assert unchanged({"stage1.steps": 3, "gate.min_gain": 9}) == ["prepare", "validate", "base"]
    assert unchanged({"gate.min_gain": 9}) == [step.name for step in STEPS[: STEPS.index(BY_NAME["register"])]]


def test_a_new_section_reaches_the_tasks_whose_steps_depend_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extra(Section):
        value: int = 1

    class Wider(Config):
        extra: Extra = Extra()

    stage1 = BY_NAME["stage1"]
    monkeypatch.setitem(BY_NAME, "stage1", replace(stage1, sections=(*stage1.sections, "extra")))
    without = [task for task in TASKS if "extra" not in parameters_of(task, Wider())]
    assert without == ["prepare", "validate", "base"]


def test_sections_come_out_of_a_task_s_parameters_as_they_went_in() -> None:
    config = parse_config({"seed": 4, "evaluate": {"limit": 3}, "prepare": {"sources": [{"kind": "easy_vqa"}]}})
    given = json.loads(json.dumps(parameters_of("register", config)), parse_int=float)
    assert parse_config({key: value for key, value in given.items() if key != IDENTITY}) == config


def test_a_parameter_that_may_be_null_is_null_by_default_so_that_a_null_can_be_left_out() -> None:
    def fields(section: type[Section]) -> Iterator[tuple[str, Any]]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from fields(field.annotation)
            elif type(None) in get_args(field.annotation):
                yield f"{section.__name__}.{name}", field.default

    found = {name: default for section in (Config, *SOURCES.values()) for name, default in fields(section)}
    assert "EvaluateConfig.limit" in found
    assert [name for name, default in found.items() if default is not None] == []


def test_new_data_in_a_source_s_folder_changes_what_prepare_is_cached_by(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"image": "image.png"}\n')
    config = Config(prepare=PrepareConfig(sources=(JsonlSource(kind="jsonl", path=file, split="train"),)))
    before, validate = parameters_of("prepare", config), parameters_of("validate", config)
    assert parameters_of("prepare", config) == before
    (tmp_path / "image.png").write_bytes(b"new")
    assert sources_fingerprint(config) != before[IDENTITY]["sources"]
    assert parameters_of("validate", config) == validate


def test_a_change_of_code_changes_what_those_steps_are_cached_by_that_use_it(tmp_path: Path) -> None:
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for folder in ("vismem", "deploy", "assets"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def changed_by(file: str) -> set[str]:
        before = {step.name: code_fingerprint(step.name, tmp_path) for step in STEPS}
        with (tmp_path / file).open("a") as code:
            code.write("\n# changed\n")
        return {name for name, code in before.items() if code_fingerprint(name, tmp_path) != code}

    assert {code_fingerprint(step.name, tmp_path) for step in STEPS} == {code_fingerprint(step.name) for step in STEPS}
    assert changed_by("vismem/serving/client.py") == {"deploy"}
    assert changed_by("vismem/training/stage2.py") == {"stage1", "stage2"}
    assert changed_by("vismem/validation/validate.py") == {"validate"}
    assert changed_by("vismem/data/sample.py") >= {"prepare", "validate", "stage1", "stage2", "evaluate", "export"}
    assert changed_by("vismem/kubeflow/task.py") == set()
    assert changed_by("assets/tiny-vlm/model.safetensors") == {"base"}
    assert changed_by("assets/tiny-vlm-memory/memory.safetensors") == set()


def test_configure_returns_one_dictionary_per_task(tmp_path: Path) -> None:
    page = tmp_path / "configure" / "resolved"
    given = configure("smoke", {"seed": 5}, str(page), gpus=2)
    assert given == tuple(parameters_of(task, resolve("smoke", {"seed": 5, "preflight.gpus": 2})) for task in TASKS)
    assert load_config(page) == resolve("smoke", {"seed": 5, "preflight.gpus": 2})


def test_on_a_cluster_preflight_asks_for_mlflow_and_overrides_win_over_the_pods_gpus(tmp_path: Path) -> None:
    overrides = {"preflight": {"environment": ["TOKEN"], "gpus": 1}}
    for image, environment in (("train:1.0", ["TOKEN", "MLFLOW_TRACKING_URI"]), ("", ["TOKEN"])):
        preflight = configure("", overrides, str(tmp_path / "page"), image, 4)[0]["preflight"]
        assert (preflight["environment"], preflight["gpus"]) == (environment, 1)
    configure("", {"registry.tracking_uri": "ssh://git@host"}, str(tmp_path / "page"), "train:1.0", 1)
    with pytest.raises(UserError, match=r"holds credentials.*://\*\*\*"):
        configure("", {"registry.tracking_uri": "http://t0ken@host"}, str(tmp_path / "page"), "train:1.0", 0)


# --- the summary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "head"),
    [
        ("COMPLETE", "# The run succeeded"),  # Kubeflow's driver
        ("SUCCEEDED", "# The run succeeded"),  # the local runner
        ("FAILED", "# The run failed"),
        ("CANCELED", "# The run was canceled"),
        ("RUNNING", "# The run did not complete"),  # a pod was lost
        ("ABORTED", "# The run ended in state ABORTED"),
        ("", "# The run ended in state unknown"),
    ],
)
def test_the_summary_knows_the_states_of_the_driver_and_of_the_local_runner(
    tmp_path: Path, state: str, head: str
) -> None:
    text = write_summary(str(tmp_path / "summary" / "page"), state)
    assert (tmp_path / "summary" / "page").read_text() == text
    assert text.splitlines()[0] == head
    assert ("hands over no error message" in text) == (head != "# The run succeeded")


def test_the_summary_holds_the_error_message_that_kubeflow_gives(tmp_path: Path) -> None:
    text = write_summary(str(tmp_path / "page"), "FAILED", "Task stage1 failed.")
    assert "\nTask stage1 failed.\n" in text
    assert "its log ends with the reason" in text
    assert "no error message" not in text


# --- a task -----------------------------------------------------------------------------------------------------------


def artifact(path: Path) -> Any:
    return SimpleNamespace(path=str(path), metadata={})


def test_a_task_runs_its_step_and_describes_its_output(tmp_path: Path) -> None:
    source = {"kind": "scenes", "train": 3, "validation": 1, "test": 2}
    config = parse_config({"prepare": {"sources": [source]}})
    out, metrics = artifact(tmp_path / "prepare" / "prepare"), artifact(tmp_path / "prepare" / "metrics")
    run_task(parameters_of("prepare", config), out, metrics=metrics)
    assert metrics.metadata == {"rows_test": 2.0, "rows_validation": 1.0, "rows_train": 3.0}
    assert json.loads(Path(metrics.path).read_text()) == metrics.metadata
    assert out.metadata["data_sha256"] == json.loads((Path(out.path) / "stats.json").read_text())["data_sha256"]


def test_a_task_of_a_cluster_says_which_run_and_which_image_it_belongs_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("KFP_RUN_ID", "VISMEM_IMAGE"):
        monkeypatch.setenv(variable, "")  # so that they are put back
    with pytest.raises(UserError):
        run_task(parameters_of("register", Config()), artifact(tmp_path / "register"), image="host/train@1", run="k1")
    assert origin_tags() == {"kfp_run_id": "k1", "image": "host/train@1"}


def test_a_task_whose_input_is_missing_says_so(tmp_path: Path) -> None:
    out, missing = artifact(tmp_path / "validate" / "validate"), artifact(tmp_path / "prepare")
    with pytest.raises(UserError, match="needs the output of 'prepare'"):
        run_task(parameters_of("validate", Config()), out, prepare=missing)
    assert out.metadata == {}


def test_figures_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (tmp_path / "metrics.json").write_text('{"accuracy": NaN, "n": 12, "tasks": {}, "parameters": Infinity}')
    assert describe("base", tmp_path)[1] == {"n": 12.0}


def test_the_figures_of_a_run_are_the_evaluation_s(tmp_path: Path) -> None:
    scores(66.0, 6.0).write(tmp_path)
    figures = describe("evaluate", tmp_path)[1]
    assert [figures[name] for name in ("vismem_overall", "gain", "gain_low", "gain_high")] == [66.0, 6.0, 4.0, 8.0]


@pytest.mark.parametrize(("promoted", "head"), [(True, "# Promoted"), (False, "# Not promoted")])
def test_the_page_of_promote_gives_the_outcome_with_its_reasons(tmp_path: Path, promoted: bool, head: str) -> None:
    reasons = ("the gain is 1.0 points",)
    release = Release(name="vismem", version="4", model_id="m-1", promoted=promoted, previous=None, reasons=reasons)
    release.write(tmp_path)
    page = render_report("promote", tmp_path)
    assert page.startswith(f"{head}: vismem version 4\n\n- the gain is 1.0 points\n")
    assert ("Nothing is deployed" in page) is not promoted


def test_yes_no_questions_are_counted_by_reference_and_answer(tmp_path: Path) -> None:
    rows = [("yes", "Yes"), ("yes", "no"), ("no", "no"), ("no", None), ("red", "yes")]
    table = pa.table({"reference": [row[0] for row in rows], "extracted": [row[1] for row in rows]})
    (tmp_path / "predictions").mkdir()
    pq.write_table(table, tmp_path / "predictions" / "vismem.parquet")
    folder, page = str(tmp_path), str(tmp_path / "page")
    assert write_confusion(folder, page) == (["yes", "no", "other"], [[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    assert json.loads((tmp_path / "page").read_text())["counts"][0] == [1, 1, 0]
    pq.write_table(table.slice(4), tmp_path / "predictions" / "vismem.parquet")
    assert write_confusion(folder, page) is None
    assert write_confusion(str(tmp_path / "elsewhere"), page) is None
