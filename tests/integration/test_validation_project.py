"""`gx/` of `validate`: a project that Great Expectations itself opens, anywhere, and pages that load nothing."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from prepared import good, run, shards, verdicts

from vismem.provenance import file_hashes

ID = "9f1b0d84-1c2d-4222-8333-123456789abc"  # as Great Expectations' own are
BAD = '<img src=http://a.b/c><meta http-equiv=refresh content="0;url=http://a.b"><form action=http://a.b>'
MINE = "[{type: expect_column_values_to_not_match_regex, kwargs: {column: id, regex: '^[0-9a-f]{8}-'}, severity: info}]"
PLUGIN = "from great_expectations.expectations import ExpectColumnValuesToNotMatchRegex as Parent\n"
PLUGIN += "class ExpectFewLetters(Parent):\n    regex: str = 'zz'\n"
RERUN = """
import json
import great_expectations as gx
context = gx.get_context(mode="file")
import letters
result = context.checkpoints.get("data").run()
found = [one for run in result.run_results.values() for one in run.results]
print(json.dumps({one.expectation_config.meta["rule"]: one.success for one in found}))
"""


@pytest.fixture
def validated(tmp_path: Path) -> Path:
    """Validated data with a row that would run a script in a page, and another that breaks an own rule."""
    bad = dataclasses.replace(good("train", 1), question="<scr<script></script>ipt>alert(1)</script>", answer=BAD)
    named = dataclasses.replace(good("train", 2), id=ID)
    shards(tmp_path, train=[*(good("train", n) for n in range(3, 20)), bad, named])
    known = "{type: expect_column_values_to_be_in_set, kwargs: {column: answer, value_set: [a, b]}, severity: info}"
    letters = "{type: expect_few_letters, kwargs: {column: answer}}"
    (tmp_path / "mine.yaml").write_text(f"{MINE[:-1]}, {known}, {letters}]")
    (tmp_path / "letters.py").write_text(PLUGIN)
    run(tmp_path, expectations=tmp_path / "mine.yaml", plugins=(tmp_path / "letters.py",))
    return tmp_path / "validate"


def test_great_expectations_runs_the_checkpoint_again_in_another_place_with_the_same_verdicts(
    validated: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(validated, moved)
    done = subprocess.run([sys.executable, "-c", RERUN], cwd=moved, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found == {name: rule["success"] for name, rule in verdicts(moved)["rules"].items()}
    assert found["answers_among_choices"] is False
    assert list(pd.read_parquet(moved / "gx" / "facts" / "rows.parquet")["id"]) == [
        *(f"{split}-{n}" for split in ("test", "validation") for n in range(20)),
        *(f"train-{n}" for n in range(3, 20)), "train-1", ID,
    ]  # fmt: skip


def test_the_suite_is_great_expectations_own_json(validated: Path) -> None:
    suite = json.loads((validated / "gx" / "expectations" / "rows.json").read_text())
    by_name = {entry["meta"]["rule"]: entry for entry in suite["expectations"]}
    assert by_name["no_leakage"]["type"] == "expect_column_values_to_be_null"
    assert by_name["no_leakage"]["severity"] == "critical"
    assert by_name["ids_filled"]["kwargs"] == {"column": "id_chars", "min_value": 1.0}


def test_the_data_docs_load_nothing_and_lead_to_each_other(validated: Path) -> None:
    docs = validated / "gx" / "uncommitted" / "data_docs" / "local_site"
    pages = {path.relative_to(docs).as_posix(): path.read_text() for path in docs.rglob("*.html")}
    linked = re.findall(r'href="([^"#]+)"', pages["index.html"])
    assert sorted([*linked, "index.html"]) == sorted(pages)
    for page in pages.values():
        assert not re.search(r"<(script|link|iframe|object|form)\b|<meta http-equiv=refresh", page)
        assert "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'" in page
    result = pages["validations/rows/validate/19700101T000000.000000Z/facts-rows.html"]
    assert ID in result, "an identifier of the data is shown as it is"
    assert "&lt;form action=http://a.b&gt;" in result, "it is shown as it is too"
    assert "http://a.b" not in re.sub(r"&lt;.*?&gt;", "", result)
    assert [path for path in docs.rglob("*") if path.is_file() and path.suffix != ".html"] == []


def test_the_same_data_gives_the_same_files_byte_for_byte(validated: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "prepare", again / "prepare")
    run(again, expectations=tmp_path / "mine.yaml", plugins=(tmp_path / "letters.py",))
    first, second = file_hashes(validated), file_hashes(again / "validate")
    assert first == second
    assert str(tmp_path) not in "".join(
        path.read_text() for path in (validated / "gx").rglob("*") if path.suffix in (".json", ".yml", ".html")
    )
