"""The training benchmarks at toy size: they run, and their parts add up."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_part_counts_its_own_seconds_and_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import timing

    clock = iter(range(100))
    monkeypatch.setattr(timing, "now", lambda: float(next(clock)))

    class Work:
        def outer(self) -> None:
            self.inner()
            self.inner()

        def inner(self) -> None:
            pass

    parts = timing.Parts()
    parts.wrap(Work, "outer", "outer")
    parts.wrap(Work, "inner", "inner")
    assert parts.run(Work().outer) == {"the rest": 2, "outer": 3, "inner": 2}
    parts.close()
    assert "__wrapped__" not in vars(Work.outer)
    parts = timing.Parts()
    parts.wrap(Work, "outer", "outer", whole=True)
    parts.wrap(Work, "inner", "inner")
    assert parts.run(Work().outer).keys() == {"the rest", "outer"}


def test_the_grpo_benchmark_reports_both_of_our_sides(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import grpo_step

    out = tmp_path / "found.json"
    toy = ["--base", str(tiny_base), "--prompts", "2", "--group", "3", "--tokens", "6", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["grpo_step.py", *toy, "--json", str(out), "--no-peak"])
    monkeypatch.setattr(grpo_step.trl_side, "missing", lambda: "not installed: trl")
    grpo_step.main()
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "TRL's side is left out (not installed: trl)" in printed
    assert "| ours, stage I |" in printed
    for name in (grpo_step.OURS, grpo_step.STAGE1):
        assert len(found["seconds"][name]) == 2
        assert sum(found["parts"][name].values()) == pytest.approx(sum(found["seconds"][name]) / 2)
        assert {"sampling", "replay, forward", "reference", "backward"} <= found["parts"][name].keys()
    assert found["parts"][grpo_step.OURS].get("forming", 0) == 0
    assert found["parts"][grpo_step.STAGE1]["forming"] > 0
