"""The training benchmarks at toy size: they run, and their parts add up."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_part_counts_its_own_seconds_and_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import common

    clock = iter(range(100))
    monkeypatch.setattr(common, "now", lambda: float(next(clock)))

    class Work:
        def outer(self) -> None:
            self.inner()
            self.inner()

        def inner(self) -> None:
            pass

    parts = common.Parts()
    parts.wrap(Work, "outer", "outer")
    parts.wrap(Work, "inner", "inner")
    assert parts.run(Work().outer) == {"the rest": 2, "outer": 3, "inner": 2}
    parts.close()
    assert "__wrapped__" not in vars(Work.outer)
    parts = common.Parts("outer")
    parts.wrap(Work, "outer", "outer")
    parts.wrap(Work, "inner", "inner")
    assert parts.run(Work().outer).keys() == {"the rest", "outer"}


def test_the_grpo_benchmark_reports_both_of_our_sides(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import grpo_step

    out = tmp_path / "found.json"
    toy = ["--base", str(tiny_base), "--prompts", "2", "--group", "3", "--tokens", "6", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["grpo_step.py", *toy, "--json", str(out)])
    monkeypatch.setattr(grpo_step, "MISSING", ["trl"])
    grpo_step.main()
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "TRL's side is left out (not installed: trl)" in printed
    assert "| ours, stage I |" in printed
    assert found["peak_mib"].keys() == found["seconds"].keys()
    for name in (grpo_step.OURS, grpo_step.STAGE1):
        assert len(found["seconds"][name]) == 2
        assert sum(found["parts"][name].values()) == pytest.approx(sum(found["seconds"][name]) / 2)
        assert {"sampling", "replay, forward", "reference", "backward"} <= found["parts"][name].keys()
    assert found["parts"][grpo_step.OURS].get("forming", 0) == 0
    assert found["parts"][grpo_step.STAGE1]["forming"] > 0


def test_the_gpu_benchmark_runs_at_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    out = tmp_path / "found.json"
    size = ["--size", "tiny", "--side", "84", "--memories", "2", "--batches", "1", "2"]
    steps = ["--prompts", "1", "--group", "3", "--tokens", "6", "--steps", "1", "--streams", "4"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *size, *steps, "--json", str(out)])
    gpu.main()
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "| stage I | 3 |" in printed
    assert "| stage II | 3 |" in printed
    assert [d["batch"] for d in found["decoding"]] == [1, 2]
    for stage in found["training"]:
        assert stage["flops"] > 0
        assert stage["tokens"] == 3 * 6
        assert stage["settings"]["gradient_checkpointing"], "as the 7B profile has it"
        assert 0.5 < stage["peak_bytes"] / stage["planned_bytes"] <= 1, "a plan counts as many memories as may come"
        assert stage["planned_seconds"] is None, "a plan knows no time of a CPU"
    assert found["training"][0]["parts"]["backward"] > 0
    assert found["training"][0]["trained"] > found["training"][1]["trained"]
    assert all(d["tokens_s"] > 0 and d["hugging_face_tokens_s"] > 0 for d in found["decoding"])
    assert {d["same"] for d in found["decoding"]} == {1}, "the answers are Hugging Face's"
    off, forced = found["serving"]
    assert (off["memory"], off["memories"], off["same"]) == ("off", 0, 1), "the answers are as when decoded alone"
    assert (forced["memory"], forced["memories"]) == ("forced", pytest.approx(2, abs=0.5))
    for served in (off, forced):
        assert (served["streams"], served["answers"]) == (4, 12)
        assert served["tokens"] == 3 * (2 + 3 + 5 + 6), "answers of a quarter to the whole of the length"
        assert served["first_p95_s"] > 0


def test_the_real_configuration_is_the_7b_model() -> None:
    """Built on the meta device: the number of parameters is Qwen2.5-VL-7B's."""
    import qwen

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig(**qwen.SEVEN_B, tie_word_embeddings=False))
    assert sum(p.numel() for p in model.parameters()) == 8_292_166_656
