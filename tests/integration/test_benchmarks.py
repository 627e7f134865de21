"""Every benchmark still runs, at toy size. Speed is measured elsewhere: nothing here looks at a clock."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Run a benchmark as a script, as `python benchmarks/NAME.py ARGUMENTS` would; its exit status must be 0."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def script(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        assert stopped.value.code == 0

    return script


def test_decoding_compares_equal_tokens_and_reports_ratios(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = ["--assets", "--items", "4", "--batch", "1", "4", "--repeats", "2", "--max-new-tokens", "8"]
    run("decoding", *options, "--out", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["batches"]) == {"1", "4"}
    for row in figures["batches"].values():
        assert row["tokens"] == figures["batches"]["1"]["tokens"] <= 4 * 8
        assert 0 < row["memory_share"]["median"] < 1
        assert row["speed"]["low"] <= row["speed"]["median"] <= row["speed"]["high"]
    assert set(figures["peak_mib"]) == set(row["seconds_a_sample"])


def test_validation_reports_its_speed(run, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    run("validate", "--rows", "40")
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures["rows"] == 40
