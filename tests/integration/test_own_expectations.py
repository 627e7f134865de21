"""Rules of the user's own in `validate`: a file of expectations, classes of their own, and other severities."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from prepared import broken_rules, good, quarantined, run, shards, stopped

from vismem.config import parse_config
from vismem.data.sample import read_samples
from vismem.data.source_files import record_outside
from vismem.errors import UserError
from vismem.kubeflow.parameters import parameters_of

IDS_END = {"type": "expect_column_values_to_not_match_regex", "kwargs": {"column": "id", "regex": "-1[12]$"}}
PLUGIN = """
from great_expectations.expectations import ExpectColumnValuesToNotMatchRegex

def ten(to):
    return f"-1[0-{to}]$"

class ExpectNoTeens(ExpectColumnValuesToNotMatchRegex):
    regex: str = ""

    def __init__(self, **kwargs):
        super().__init__(**{"regex": ten(9)} | kwargs)
"""


def written(folder: Path, *entries: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(list(entries)))
    return path


def test_the_rows_that_break_an_own_rule_are_set_apart_with_the_reason(tmp_path: Path) -> None:
    shards(tmp_path)
    mine = written(tmp_path, IDS_END | {"severity": "warning", "meta": {"rule": "no_eleven"}})
    found = run(tmp_path, expectations=mine, max_quarantined=0.5)
    assert broken_rules(found) == ["no_eleven"]
    reasons = {row["id"]: row["reason"] for row in quarantined(tmp_path)}
    assert reasons == {
        f"{s}-{n}": f"no_eleven: id is '{s}-{n}'" for s in ("train", "validation", "test") for n in (11, 12)
    }
    assert len(read_samples(tmp_path / "validate" / "data" / "train")) == 18


def test_an_own_rule_of_severity_info_only_names_the_rows(tmp_path: Path) -> None:
    shards(tmp_path)
    found = run(tmp_path, expectations=written(tmp_path, IDS_END | {"severity": "info"}))
    name = "column_values_to_not_match_regex_id"
    assert broken_rules(found) == [name]
    assert found["rules"][name]["severity"] == "warning"
    assert found["rules"][name]["message"].startswith(
        "2 of test, 2 of validation, 2 of train; first test/part-00001 row 3"
    )
    assert quarantined(tmp_path) == []
    page = (tmp_path / "validate" / "report.html").read_text()
    for split in ("train", "validation", "test"):
        assert f"row 4 (id &#39;{split}-12&#39;): id is &#39;{split}-12&#39;" in page


def test_a_critical_own_rule_stops_the_pipeline(tmp_path: Path) -> None:
    shards(tmp_path)
    stopped(tmp_path, r"column_values_to_not_match_regex_id: 2 of test", expectations=written(tmp_path, IDS_END))


def test_an_own_rule_may_judge_a_column_as_a_whole_or_columns_together(tmp_path: Path) -> None:
    shards(tmp_path)
    mean = {"type": "expect_column_mean_to_be_between", "kwargs": {"column": "question_chars", "min_value": 7}}
    pair = {"type": "expect_column_pair_values_a_to_be_greater_than_b", "severity": "info"}
    pair["kwargs"] = {"column_A": "answer_chars", "column_B": "question_chars"}
    rows = {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 60}, "severity": "info"}
    found = stopped(tmp_path, "observed: 6", expectations=written(tmp_path, mean, pair, rows))
    assert broken_rules(found) == [
        "column_mean_to_be_between_question_chars",
        "column_pair_values_a_to_be_greater_than_b_answer_chars_question_chars",
    ]
    assert "answer_chars is '1', question_chars is '6'" in found["rules"][broken_rules(found)[1]]["message"]


def test_a_share_of_exceptions_that_an_own_rule_allows_is_not_set_apart(tmp_path: Path) -> None:
    shards(tmp_path)
    mostly = IDS_END | {"kwargs": IDS_END["kwargs"] | {"mostly": 0.9}, "severity": "warning"}  # type: ignore[operator]
    assert broken_rules(run(tmp_path, expectations=written(tmp_path, mostly))) == []
    assert quarantined(tmp_path) == []


def test_a_suite_that_great_expectations_saved_is_such_a_file(tmp_path: Path) -> None:
    shards(tmp_path)
    suite = tmp_path / "suite.json"
    suite.write_text(json.dumps({"name": "mine", "expectations": [IDS_END | {"severity": "info", "id": None}]}))
    assert broken_rules(run(tmp_path, expectations=suite)) == ["column_values_to_not_match_regex_id"]


def test_an_expectation_class_of_the_users_own_judges(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "teens.py").write_text(PLUGIN)
    mine = written(tmp_path, {"type": "expect_no_teens", "kwargs": {"column": "id"}, "severity": "warning"})
    run(tmp_path, expectations=mine, plugins=(tmp_path / "teens.py",), max_quarantined=0.5, max_split_loss=0.5)
    assert len(quarantined(tmp_path)) == 30


def test_an_own_rule_that_cannot_be_evaluated_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    dates = {"type": "expect_column_values_to_be_between", "kwargs": {"column": "id", "min_value": "2026-01-01"}}
    with pytest.raises(
        UserError, match=r"rule column_values_to_be_between_id cannot be evaluated: '.* of the same type\.'$"
    ):
        run(tmp_path, expectations=written(tmp_path, dates))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"type": "expect_column_values_to_be_nul", "kwargs": {"column": "id"}},
            "did you mean 'expect_column_values_to_be_null'",
        ),
        (
            IDS_END | {"kwargs": {"column": "answers", "regex": "a"}},
            "no column 'answers' .did you mean 'answer'..; columns: answer, ",
        ),
        (
            IDS_END | {"kwargs": {"column": "id", "regexp": "a"}},
            "expectation 1: expect_column_values_to_not_match_regex: .*regexp",
        ),
        (
            IDS_END | {"kwargs": {"column": "id", "regex": "a", "row_condition": "id == @pd.io.common.os.getcwd()"}},
            "row_condition would run as Python: write the condition as a class, in validate.plugins",
        ),
        (IDS_END | {"severity": "bad"}, "severity 'bad': critical stops, warning sets rows apart, info only says so"),
        (IDS_END | {"meta": {"rule": "no_leakage"}}, "another rule 'no_leakage'"),
        (
            {"type": "expect_column_mean_to_be_between", "kwargs": {"column": "images"}, "severity": "warning"},
            "no single row to set apart",
        ),
        ("id", "is not of the form"),
        (IDS_END | {"meta": "rule"}, "is not of the form"),
    ],
)
def test_an_own_rule_that_cannot_be_one_is_named_in_one_line(tmp_path: Path, entry: Any, said: str) -> None:
    shards(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        run(tmp_path, expectations=written(tmp_path, entry))
    assert "mine.yaml, expectation 1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"expectations": Path("none.yaml")}, "cannot read none.yaml"),
        ({"plugins": (Path("none.py"),)}, "validate.plugins: none.py: FileNotFoundError"),
        ({"severities": {"no_leak": "warning"}}, "no rule 'no_leak' .did you mean 'no_leakage'."),
        ({"severities": {"task_drift": "quarantine"}}, "task_drift: it judges no single row to set apart"),
    ],
)
def test_settings_that_name_nothing_are_explained(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    shards(tmp_path)
    with pytest.raises(UserError, match=said):
        run(tmp_path, **settings)


def test_a_plug_in_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=r"validate\.plugins: .*broken\.py: ZeroDivisionError: division by zero"):
        run(tmp_path, plugins=(tmp_path / "broken.py",))


def test_another_severity_refuses_the_data_or_lets_it_pass(tmp_path: Path) -> None:
    twice = good("train", 3)
    shards(tmp_path, train=[good("train", n) for n in range(20)] + [twice])
    assert run(tmp_path, severities={"ids_unique": "warning"})["rows"]["quarantined"] == 0
    assert [
        row["id"] for row in (run(tmp_path, severities={"rows_distinct": "quarantine"}), *quarantined(tmp_path))[1:]
    ] == ["train-3"]
    stopped(tmp_path, "ids_unique: 1 of train", severities={"ids_unique": "error"})


def test_a_changed_file_of_rules_runs_validate_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In DVC by what it depends on, on Kubeflow by the key of its cache."""
    monkeypatch.chdir(tmp_path)
    stages = yaml.safe_load((Path(__file__).parents[2] / "dvc.yaml").read_text())["stages"]
    assert "data" in stages["validate"]["deps"]
    config, found = parse_config({"validate": {"expectations": "mine.yaml"}}), []
    for entries in ((), (), (IDS_END,)):
        if not found or entries:
            written(tmp_path, *entries)
        record_outside(config)
        found.append((Path("data/outside.json").read_text(), parameters_of("validate", config)))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert found[0][1] != found[2][1]
