"""What a run prints at its end, from the files that its steps leave."""

import subprocess
import sys
from pathlib import Path

import pytest
from project import scores
from rich.console import Console

from vismem.config import Config
from vismem.errors import UserError
from vismem.files import write_json, write_text
from vismem.messages import Caller
from vismem.provenance import MANIFEST, sha256_file, write_manifest
from vismem.records import Release, Rule, Verdict
from vismem.summary import example_lines, print_models, print_summary, verdict_lines

HEAVY = ("torch", "transformers", "mlflow", "dvc", "pandas", "matplotlib", "scipy", "pyarrow")
RULES = (
    Rule(name="gain", passed=True, reason="the gain is +6.00 points"),
    Rule(name="time", passed=False, reason="it takes [twice] as long"),
)
RELEASE = Release(promoted=False, name="vismem", version="2", model_id="m-1", previous=None, reasons=())
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
    scores().write(tmp_path / "evaluate")
    Verdict(passed=False, rules=RULES).write(tmp_path / "promote")
    RELEASE.write(tmp_path / "promote")
    write_json(tmp_path / "deploy" / "smoke.json", SMOKE)
    write_text(tmp_path / "validate" / "report.html", "")
    return tmp_path


def test_a_refused_run_shows_scores_every_rule_the_example_and_the_reports_that_exist(artifacts: Path) -> None:
    console = Console(record=True, width=200, quiet=False, file=(artifacts / "out.txt").open("w"))
    print_summary(Config(), artifacts, Caller(artifacts.parent, "smoke"), console)
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
    assert "Ask it yourself" not in text, "there is no picture"


def test_the_summary_ends_with_a_command_to_paste(artifacts: Path) -> None:
    for name in ("example-2.png", "example-1.jpeg"):
        write_text(artifacts / "deploy" / name, "")
    console = Console(record=True, width=20, file=(artifacts / "out.txt").open("w"))
    print_summary(Config(), artifacts, Caller(artifacts.parent, "smoke"), console)
    here = artifacts.name
    line = lines(console)[-1]
    assert line.endswith(
        f"vismem ask --model {here}/export --image {here}/deploy/example-1.jpeg --image {here}/deploy/example-2.png "
        "'which is [left]?'"
    )


def test_a_last_evaluation_without_vismem_has_no_table_of_it(artifacts: Path) -> None:
    metrics = scores()
    del metrics.arms["vismem"]
    metrics.write(artifacts / "evaluate")
    console = Console(record=True, file=(artifacts / "out.txt").open("w"))
    print_summary(Config(), artifacts, Caller(artifacts.parent), console)
    text = "\n".join(lines(console))
    assert "NOT RELEASED: the gate refused vismem version 2" in text
    assert "understanding" not in text


@pytest.mark.parametrize("earlier", ["", "export", "evaluate"])
def test_scores_are_not_shown_beside_the_verdict_on_another_model(artifacts: Path, earlier: str) -> None:
    model = "of another" if earlier == "evaluate" else scores().stage2_sha256
    write_json(artifacts / "export" / "lineage.json", {"inputs_sha256": {"stage2": model}})
    write_manifest(artifacts / "export")
    judged = "of another" if earlier == "export" else sha256_file(artifacts / "export" / MANIFEST)
    RELEASE.model_copy(update={"manifest_sha256": judged}).write(artifacts / "promote")
    console = Console(record=True, width=200, file=(artifacts / "out.txt").open("w"))
    print_summary(Config(), artifacts, Caller(artifacts.parent), console)
    text = console.export_text()
    assert "66.0" in text
    assert ("NOT RELEASED" in text, "which is [left]?" in text) == (not earlier,) * 2
    assert ("NOT JUDGED YET: the last verdict, of vismem version 2, is of an earlier run" in text) == bool(earlier)


def test_the_summary_needs_nothing_heavy(artifacts: Path) -> None:
    write_text(artifacts / "params.yaml", "seed: 0\n")
    program = (
        "import sys; from vismem.cli import main\n"
        "status = main(['summary', '--artifacts', '.'])\n"
        f"sys.exit(status or [name for name in {HEAVY} if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=artifacts, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "NOT RELEASED" in done.stdout


def test_a_release_is_called_one() -> None:
    release = RELEASE.model_copy(update={"promoted": True})
    line = verdict_lines(Verdict(passed=True, rules=RULES[:1]), release)[0]
    assert "RELEASED" in line
    assert "NOT" not in line
    assert "trying out" not in "".join(example_lines({**SMOKE, "promoted": True}))


def test_a_missing_result_names_the_step_to_run(artifacts: Path) -> None:
    (artifacts / "deploy" / "smoke.json").unlink()
    with pytest.raises(UserError, match=r"deploy/smoke\.json is not there: run `vismem deploy`"):
        print_summary(Config(), artifacts, Caller(artifacts))


def test_an_empty_registry_says_what_to_run(tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=(tmp_path / "out.txt").open("w"))
    print_models([], "vismem", "sqlite:///mlflow.db", console)
    assert lines(console) == ["no version of 'vismem' in sqlite:///mlflow.db yet: run `vismem register`"]
