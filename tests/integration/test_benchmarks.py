"""Every benchmark still runs, at toy size. Speed is measured elsewhere: nothing here looks at a clock."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Run a benchmark as a script, as `python benchmarks/NAME.py ARGUMENTS` would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def script(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"))["main"]()

    return script


def test_decoding_compares_equal_tokens_and_reports_ratios(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = ["--items", "4", "--batch", "1", "4", "--repeats", "2", "--max-new-tokens", "8"]
    run("decoding", "--artifacts", str(tmp_path), *options, "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["batches"]) == {"1", "4"}
    for row in figures["batches"].values():
        assert row["tokens"] == figures["batches"]["1"]["tokens"] <= 4 * 8
        assert 0 < row["memory_share"]["median"] < 1
        shares = [row["speed"][side] for side in ("vanilla", "onnx")]
    assert set(figures["peak_mib"]) == set(row["seconds_per_sample"])
    shares += [figures["long_memory"][executor] for executor in ("torch", "onnx")]
    assert all(share["low"] <= share["median"] <= share["high"] for share in shares)


def test_validation_reports_its_speed(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run("validate", "--rows", "40", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["rows"] == 40
    assert figures["peak_gib"] > 0


def test_a_server_whose_clients_are_killed_answers_the_others(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run("abuse", "--server", "api", "--seconds", "8", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["clients_killed"] > 0
    assert figures["answers"] > 0
    assert (figures["failed"], figures["mixed_up"], figures["same_afterwards"]) == (0, 0, True)


def test_coverage_compares_clusters_with_questions(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run("coverage", "--trials", "40", "--resamples", "100", "--json", str(tmp_path / "figures.json"))
    settings = json.loads((tmp_path / "figures.json").read_text())["settings"]
    assert len(settings) == 9
    for row in settings:
        assert 80 <= row["score_covers"] <= 100
        assert row["ours"]["covers"] >= 80
        if row["questions"] == 1:
            assert row["ours"] == row["by_questions"], "nothing changes where each question has its image"
        if row["questions"] == 20:
            assert row["by_questions"]["covers"] < row["ours"]["covers"]
