"""Around the steps: parameters from parts, what a cache may know, the journal, the summary, what a step is told by."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vismem.config import Config, JsonlSource, PrepareConfig, defaults, parse_config, resolve, without_nulls
from vismem.errors import UserError
from vismem.launch import LaunchConfig
from vismem.orchestration import close_run, launch_fields, open_run, parameters_of, run_task, yes_no_confusion
from vismem.orchestration import journal as notes
from vismem.orchestration.parameters import IDENTITY, sources_fingerprint
from vismem.orchestration.results import describe
from vismem.orchestration.summary import render
from vismem.steps import STEPS

ROOT = Path(__file__).parents[2]
RUN = "vismem-2026-01-02-03-04-05-678901"

# --- parameters from parts --------------------------------------------------------------------------------------------


def profiles(folder: Path) -> Path:
    (folder / "deploy" / "profiles").mkdir(parents=True)
    (folder / "deploy" / "profiles" / "small.yaml").write_text("stage1: {steps: 5, warm_start: {steps: 6}}\nseed: 3\n")
    return folder


def test_what_is_said_later_wins_profile_section_override(tmp_path: Path) -> None:
    root = profiles(tmp_path)
    sections = {**defaults(), "stage1": {**defaults()["stage1"], "group_size": 2}}
    assert resolve("small", sections, root=root).stage1.steps == 5, "a section as it was leaves the profile's value"
    assert resolve("small", sections, root=root).stage1.group_size == 2
    sections["stage1"]["steps"] = 7
    assert resolve("small", sections, root=root).stage1.steps == 7
    config = resolve("small", sections, {"stage1.steps": 9, "stage1.warm_start.batch_size": 1}, root=root)
    assert (config.stage1.steps, config.stage1.warm_start.batch_size, config.stage1.warm_start.steps) == (9, 1, 6)
    assert config.seed == 3


def test_an_override_can_say_the_default_against_a_profile(tmp_path: Path) -> None:
    usual = Config().stage1.steps
    assert resolve("small", defaults(), {"stage1.steps": usual}, root=profiles(tmp_path)).stage1.steps == usual


def test_nothing_said_gives_the_defaults_also_where_all_numbers_became_floats() -> None:
    assert resolve() == parse_config(defaults())
    floats = json.loads(json.dumps(without_nulls(defaults())), parse_int=float)
    assert resolve("", floats) == parse_config(defaults())


@pytest.mark.parametrize(
    ("sections", "overrides", "message"),
    [
        ({"stage1": {"stepz": 3}}, {}, r"section parameters: unknown key 'stage1.stepz' \(did you mean 'steps'\?\)"),
        ({"stage7": {}}, {}, "section parameters: unknown key 'stage7'"),
        ({}, {"stage1.stepz": 3}, r"unknown key 'stage1.stepz' \(did you mean 'steps'\?\)"),
        ({}, {"stage1.steps.more": 3}, "unknown|single value|should be"),
        ({}, {"seed": "many"}, "'seed': Input should be a valid integer"),
    ],
)
def test_a_mistake_is_named_with_its_place(sections: dict[str, Any], overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve("", sections, overrides)


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
    before, after = parse_config({}), parse_config({"stage1": {"steps": 3}, "gate": {"min_gain": 9}})
    same = [step.name for step in STEPS if parameters_of(step.name, before) == parameters_of(step.name, after)]
    assert same == ["prepare", "validate", "base"]
    gate = parse_config({"gate": {"min_gain": 9}})
    same = [step.name for step in STEPS if parameters_of(step.name, before) == parameters_of(step.name, gate)]
    assert "export" in same
    assert "register" not in same


def test_sections_come_out_of_a_task_s_parameters_as_they_went_in() -> None:
    config = parse_config({"seed": 4, "evaluate": {"limit": 3}, "prepare": {"sources": [{"kind": "easy_vqa"}]}})
    given = json.loads(json.dumps(parameters_of("register", config)), parse_int=float)
    assert parse_config({key: value for key, value in given.items() if key != IDENTITY}) == config


def test_new_data_in_a_source_s_folder_changes_what_prepare_is_cached_by(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("{}\n")
    config = Config(prepare=PrepareConfig(sources=(JsonlSource(kind="jsonl", path=file, split="train"),)))
    before = parameters_of("prepare", config)
    assert parameters_of("prepare", config) == before
    (tmp_path / "image.png").write_bytes(b"new")
    assert sources_fingerprint(config) != before[IDENTITY]["sources"]
    assert parameters_of("validate", config)[IDENTITY] == {"code": before[IDENTITY]["code"]}


def test_a_run_is_opened_with_what_preflight_must_find(tmp_path: Path) -> None:
    page = tmp_path / RUN / "configure" / "resolved"
    one = {"backend": "process", "num_processes": 1, "num_nodes": 1}
    given, launch = open_run(("preflight",), "smoke", {}, {}, one, str(page), "", ["TOKEN"])
    assert launch == {}
    assert given["preflight"]["environment"] == ["TOKEN"]
    assert given["preflight"]["buckets"] == []
    given, _ = open_run(("preflight",), "smoke", {}, {"preflight.buckets": ["mine"]}, one, str(page))
    assert given["preflight"]["buckets"] == ["mine"]
    assert "learning_rate" in page.read_text()


def test_launch_fields_say_only_what_matters_to_the_back_end() -> None:
    assert launch_fields("process", 1, 1, "image", {"gpu": 1}) == {}
    assert launch_fields("torchrun", 4, 1, "image") == {"backend": "torchrun", "num_processes": 4, "num_nodes": 1}
    fields = launch_fields("trainer", 8, 2, "image", {"gpu": 8, "cpu": "4"}, [{"key": "a"}], {"zone": "b"})
    assert (fields["image"], fields["resources"], fields["tolerations"]) == (
        "image",
        {"gpu": 8, "cpu": "4"},
        [{"key": "a"}],
    )
    with pytest.raises(UserError, match="one process"):
        launch_fields("process", 2, 1)


def test_numbers_that_became_floats_on_their_way_are_whole_again() -> None:
    fields = launch_fields("trainer", 8, 2, "image", {"gpu": 8, "cpu": "4"}, [{"tolerationSeconds": 60}])
    how = LaunchConfig(**json.loads(json.dumps(fields), parse_int=float))
    assert (repr(how.num_processes), repr(how.resources["gpu"])) == ("8", "8")
    assert repr(how.tolerations) == "({'tolerationSeconds': 60},)"


# --- the journal and the summary --------------------------------------------------------------------------------------


def test_a_run_is_read_from_an_output_s_place() -> None:
    run = "0b1c2d3e-4f50-6172-8394-a5b6c7d8e9f0"
    assert (
        notes.run_of(f"/s3/bucket/v2/artifacts/vismem/{run}/stage1/11111111-2222-3333-4444-555555555555/stage1") == run
    )
    assert notes.run_of(f"/home/me/runs/pipeline/{RUN}/stage1/stage1") == RUN


def test_the_journal_tells_what_was_made_what_failed_and_who_was_killed(tmp_path: Path) -> None:
    journal = str(tmp_path / "journal")
    with notes.entry(journal, RUN, "prepare") as page:
        page.text = "made it"
    with pytest.raises(UserError), notes.entry(journal, RUN, "validate"):
        raise UserError("the data breaks 1 rule(s):\n  - a | b")
    program = "import os, sys; from vismem.orchestration import journal as n\n"
    program += "with n.entry(sys.argv[1], sys.argv[2], 'stage1'): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program, journal, RUN], check=False)
    entries = notes.read(journal, RUN)
    assert [(e.task, e.state) for e in entries] == [
        ("prepare", "succeeded"),
        ("validate", "failed"),
        ("stage1", "running"),
    ]
    page_of_summary = tmp_path / RUN / "summary" / "summary"
    text = close_run(str(page_of_summary), journal, "FAILED", "Task run failed.")
    assert page_of_summary.read_text() == text
    assert "**validate failed**: the data breaks 1 rule(s):\n  - a | b" in text
    assert "**stage1 failed**: it ended without a word: killed" in text
    assert "| validate | failed | 0 | the data breaks 1 rule(s): - a \\| b |" in text
    assert "| prepare | succeeded | 0 | made it |" in text
    assert "| deploy | - | | not run" in text


def test_a_run_is_called_good_only_where_the_pipeline_and_every_entry_say_so() -> None:
    good = notes.Entry("prepare", "succeeded", 0.0, 1.0, "made it")
    assert render([good], "SUCCEEDED").startswith("# The run succeeded")
    assert "The reason" in render([good], "FAILED", "The reason.")
    assert not render([good], "CANCELLED").startswith("# The run succeeded")
    assert not render([notes.Entry("base", "running", 0.0)], "SUCCEEDED").startswith("# The run succeeded")


def test_a_journal_that_cannot_be_written_does_not_stop_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with notes.entry(str(tmp_path / "file"), RUN, "prepare") as page:
        page.text = "made it"
    assert "cannot be written" in capsys.readouterr().err
    with notes.entry("", RUN, "prepare") as page:
        page.text = "no journal was asked for"


# --- a task -----------------------------------------------------------------------------------------------------------


def test_a_task_runs_its_step_and_tells_what_it_made(tmp_path: Path) -> None:
    source = {"kind": "scenes", "pretrain": 2, "train": 3, "validation": 1, "test": 2}
    config = parse_config({"prepare": {"sources": [source]}})
    out, journal = tmp_path / RUN / "prepare" / "prepare", str(tmp_path / "journal")
    figures = out.parent / "metrics"
    made = run_task("prepare", parameters_of("prepare", config), str(out), {}, journal, metrics=str(figures))
    assert json.loads(figures.read_text()) == made.metrics
    stats = json.loads((out / "stats.json").read_text())
    assert made.metadata["data_sha256"] == stats["data_sha256"]
    assert made.metrics == {"rows_test": 2.0, "rows_validation": 1.0, "rows_train": 3.0, "rows_pretrain": 2.0}
    (noted,) = notes.read(journal, RUN)
    assert (noted.state, noted.text) == ("succeeded", made.line)


def test_a_task_that_fails_leaves_its_reason(tmp_path: Path) -> None:
    out, journal = tmp_path / RUN / "validate" / "validate", str(tmp_path / "journal")
    with pytest.raises(UserError, match="needs the output of 'prepare'"):
        run_task("validate", parameters_of("validate", Config()), str(out), {"prepare": str(tmp_path)[:-1]}, journal)
    (noted,) = notes.read(journal, RUN)
    assert noted.state == "failed"
    assert "needs the output of 'prepare'" in noted.text


def test_figures_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (tmp_path / "metrics.json").write_text('{"accuracy": NaN, "n": 12, "tasks": {}, "parameters": Infinity}')
    assert describe("base", tmp_path).metrics == {"n": 12.0}


def test_yes_no_questions_are_counted_by_what_was_right_and_what_was_said(tmp_path: Path) -> None:
    rows = [("yes", "Yes"), ("yes", "no"), ("no", "no"), ("no", None), ("red", "yes")]
    table = pa.table({"reference": [row[0] for row in rows], "extracted": [row[1] for row in rows]})
    (tmp_path / "predictions").mkdir()
    pq.write_table(table, tmp_path / "predictions" / "vismem.parquet")
    page = str(tmp_path / "page")
    assert yes_no_confusion(tmp_path, page) == (["yes", "no", "other"], [[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    assert json.loads((tmp_path / "page").read_text())["counts"][0] == [1, 1, 0]
    pq.write_table(table.slice(4), tmp_path / "predictions" / "vismem.parquet")
    assert yes_no_confusion(tmp_path, page) is None
    assert yes_no_confusion(tmp_path, page, "short_only") is None
