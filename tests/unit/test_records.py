"""The JSON between steps: complete, typed, and written and read in one place."""

import ast
import json
import math
from pathlib import Path

import pytest
from project import PARITY, VALIDATION, scores

from vismem.errors import UserError
from vismem.records import Metrics, Record, RegisteredVersion, Release, Rule, Verdict

ROOT = Path(__file__).parents[2]
VERDICT = Verdict(passed=False, rules=(Rule(name="gain", passed=False, reason="none"),))
NAMED = {"name": "vismem", "version": "1", "model_id": "m-1"}
RECORDS: tuple[Record, ...] = (
    scores(),
    VALIDATION,
    PARITY,
    RegisteredVersion(run_id="r", manifest_sha256="ab", judged_against=None, **NAMED),
    VERDICT,
    Release(promoted=False, previous=None, reasons=("none",), **NAMED),
)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.FILE)
def test_a_record_is_read_back_and_a_missing_or_unknown_field_is_an_error(record: Record, tmp_path: Path) -> None:
    record.write(tmp_path)
    assert type(record).read(tmp_path) == record
    file = tmp_path / record.FILE
    values = json.loads(file.read_text())
    for field in (name for name, info in type(record).model_fields.items() if info.is_required()):
        file.write_text(json.dumps({key: value for key, value in values.items() if key != field}))
        with pytest.raises(UserError, match=rf"{record.FILE} is damaged \({field}: Field required\): run `vismem"):
            type(record).read(tmp_path)
    file.write_text(json.dumps({**values, "more": 1}))
    with pytest.raises(UserError, match="more: Extra inputs are not permitted"):
        type(record).read(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=rf"{record.FILE} is not there: run `vismem {record.STEP}` again"):
        type(record).read(tmp_path)


def test_a_figure_that_is_missing_within_a_field_is_an_error(tmp_path: Path) -> None:
    values = scores().model_dump(mode="json")
    del values["arms"]["vismem"]["seconds_per_sample"]
    (tmp_path / "metrics.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"arms\.vismem: .*lacks seconds_per_sample"):
        Metrics.read(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({**scores().model_dump(mode="json"), "gain": {}}))
    with pytest.raises(UserError, match="gain lacks overall"):
        Metrics.read(tmp_path)


def test_a_figure_that_is_not_finite_is_read_as_it_is_for_the_gate_to_refuse(tmp_path: Path) -> None:
    PARITY.model_copy(update={"max_memory_difference": math.nan}).write(tmp_path)
    assert math.isnan(type(PARITY).read(tmp_path).max_memory_difference)


def test_records_are_written_and_read_nowhere_else() -> None:
    names = {record.FILE for record in RECORDS}
    assert len(names) == 6
    named: dict[str, set[str]] = {name: set() for name in names}
    for file in (ROOT / "vismem").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                named[node.value].add(file.relative_to(ROOT / "vismem").as_posix())
    training = {file for file in named.pop("metrics.json") if file != "records.py"}  # theirs have the same name
    assert not [file for file in training if file.startswith(("evaluation/e", "export", "registry", "serving", "summ"))]
    assert named == {name: {"records.py"} for name in named}
