"""What a run prints at its end, from the files that its steps leave."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vismem.config import Config
from vismem.errors import UserError
from vismem.summary import example_lines, print_models, print_summary, verdict_lines

GAIN = {"delta": 6.0, "ci95": [3.5, 8.5], "p": 0.001}
INTERVALS = {"overall": [55.0, 65.0], "reasoning": [55.0, 65.0]}
METRICS: dict[str, Any] = {
    "n": 600,
    "counts": {"reasoning": 600},
    "arms": {
        "vanilla": {"overall": 60.0, "reasoning": 60.0, "seconds_per_sample": 0.10},
        "vismem": {"overall": 66.0, "reasoning": 66.0, "seconds_per_sample": 0.12},
    },
    "intervals": {"vanilla": INTERVALS, "vismem": INTERVALS},
    "gain": {"overall": GAIN, "reasoning": GAIN},
    "overhead": {"vismem": 0.2},
}
RULES = [
    {"name": "gain", "passed": True, "reason": "the gain is +6.00 points"},
    {"name": "time", "passed": False, "reason": "it takes [twice] as long"},
]
SMOKE = {
    "model": "vismem_challenger",
    "version": 2,
    "promoted": False,
    "question": "which is [left]?",
    "answer_marked": "⟨short⟩ the red one",
    "reference": "red",
}


def lines(console: Console) -> list[str]:
    return console.export_text().splitlines()


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    files = {
        "evaluate/metrics.json": METRICS,
        "register/verdict.json": {"passed": False, "rules": RULES},
        "promote/release.json": {"promoted": False, "name": "vismem", "version": "2", "reasons": []},
        "deploy/smoke.json": SMOKE,
        "validate/report.html": {},
    }
    for name, values in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps(values))
    return tmp_path


def test_a_refused_run_shows_scores_every_rule_the_example_and_the_reports_that_exist(artifacts: Path) -> None:
    console = Console(record=True, width=200, quiet=False, file=(artifacts / "out.txt").open("w"))
    print_summary(Config(), Path(artifacts.name), artifacts.parent, "smoke", console)
    text = console.export_text()
    for shown in (
        "60.0",
        "66.0",
        "NOT RELEASED: the gate refused vismem version 2",
        "✓ the gain is +6.00 points",
        "✗ it takes [twice] as long",
        "vismem_challenger (version 2, for trying out: it is not released)",
        "question   which is [left]?",
        "answer     ⟨short⟩ the red one",
        f"the data:       {artifacts.name}/validate/report.html",
        "`vismem ui --profile smoke`",
    ):
        assert shown in text
    assert "evaluate/report.html" not in text, "it was not written"


def test_a_release_is_called_one() -> None:
    release = {"promoted": True, "name": "vismem", "version": "3"}
    assert "RELEASED" in verdict_lines({"rules": RULES[:1]}, release)[0]
    assert "NOT" not in verdict_lines({"rules": RULES[:1]}, release)[0]
    assert "trying out" not in "".join(example_lines({**SMOKE, "promoted": True}))


def test_a_missing_result_names_the_step_to_run(artifacts: Path) -> None:
    (artifacts / "deploy" / "smoke.json").unlink()
    with pytest.raises(UserError, match=r"deploy/smoke\.json is not there: run `vismem deploy`"):
        print_summary(Config(), artifacts)


def test_an_empty_registry_says_what_to_run(tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=(tmp_path / "out.txt").open("w"))
    print_models([], "vismem", "sqlite:///mlflow.db", console)
    assert lines(console) == ["no version of 'vismem' in sqlite:///mlflow.db yet: run `vismem register`"]
