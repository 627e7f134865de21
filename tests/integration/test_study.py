"""`python -m recipes.study` with the real steps at toy size: killed and resumed, run again, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.study.__main__ import main

ROOT = Path(__file__).parents[2]
TOY = {
    "base": {"model": "tiny"},
    "prepare": {"sources": [{"kind": "scenes", "train": 26, "validation": 13, "test": 26}]},
    "memory": {"queries": 2, "short_length": 2, "long_length": 2, "builder_layers": 1, "lora_rank": 2},
    "grpo": {"batch_size": 2, "max_new_tokens": 4},
    "stage1": {"steps": 1, "group_size": 2, "warm_start": {"steps": 1}},
    "stage2": {"steps": 1, "group_size": 2},
    "baselines": {"supervised": {"steps": 1, "batch_size": 2}},
    "evaluate": {"max_new_tokens": 4, "bootstrap": 100},
}  # fmt: skip
ONE_SEED = [
    *("--seeds", "1", "--long-arms", "sft_lora_long", "--transfer-seeds", "0", "--stage-seeds", "0"),
    *("--arms", "vanilla", "vismem", "shuffled", "sft_lora"),
]
STEPS = ("prepare", "validate", "base", "stage1", "stage2", "sft_lora", "sft_lora_long", "evaluate")


@pytest.fixture
def project(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(tiny_base, tmp_path / "tiny")
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # recipes are not installed
    return tmp_path


def write(project: Path, **changes: Any) -> None:
    """Write the parameters, some of them changed."""
    (project / "params.yaml").write_text(yaml.safe_dump({**TOY, **changes}))


def finished(folder: Path) -> list[str]:
    file = folder / "jobs.jsonl"
    return [json.loads(line)["job"] for line in file.read_text().splitlines()] if file.is_file() else []


def contents(folder: Path) -> dict[str, float]:
    return {str(p): p.stat().st_mtime_ns for step in STEPS for p in (folder / step).rglob("*") if p.is_file()}


def test_a_killed_study_goes_on_where_it_was_and_a_finished_one_has_nothing_to_do(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, seed = project / "runs" / "study", project / "runs" / "study" / "seed-0"
    killed = subprocess.Popen([sys.executable, "-m", "recipes.study", *ONE_SEED], start_new_session=True)
    while killed.poll() is None and not (seed / "stage1.partial").is_dir():
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)  # the study and the steps that it runs, as when a machine goes down
    assert killed.wait() == -signal.SIGKILL
    assert set(finished(folder)) >= {f"seed-0/{step}" for step in ("prepare", "validate", "base")}
    assert not (seed / "stage1").exists()

    assert main([*ONE_SEED, "--write", "docs/result.md"]) == 0
    assert sorted(finished(folder)) == sorted(f"seed-0/{step}" for step in STEPS), "each finished once"
    report = json.loads((folder / "report.json").read_text())
    metrics = json.loads((seed / "evaluate" / "metrics.json").read_text())
    assert report["items"] == {"0": 26}
    scored = {arm: row["mean"] for arm, row in (report["arms"] | report["long"]["arms"]).items()}
    assert scored == {arm: row["overall"] for arm, row in metrics["arms"].items()}
    assert report["long"]["arms"].keys() - report["arms"] == {"sft_lora_long"}
    longer, equal = report["long"]["training"], report["training"]
    assert longer["sft_lora_long"]["train_samples"] == 11 * equal["sft_lora"]["train_samples"]
    assert longer["vismem"] == equal["vismem"]
    assert report["arms"]["vismem"]["gain"]["pooled"] == metrics["gain"]["overall"]
    assert report["training"]["vismem"]["train_seconds"] > 0
    verdicts = {claim["id"]: claim["verdict"] for claim in report["plan"]}
    assert {id_ for id_, verdict in verdicts.items() if verdict != "not run"} <= {"M7", "M9", "F1", "R1", "R2"}
    assert (verdicts["F2"], verdicts["C1"], verdicts["T1"]) == ("not run",) * 3
    for id_ in ("M7", "F1", "R1", "R2"):
        assert verdicts[id_] != "not run"
    assert report["training"]["sft_lora"]["trainable_parameters"] > 0
    assert (project / "docs" / "result.md").read_text() == (folder / "report.md").read_text().replace(
        "study.png", "result.png"
    )
    assert (project / "docs" / "result.png").read_bytes().startswith(b"\x89PNG")
    assert "runs/" not in (folder / "report.md").read_text(), "no paths in what is published"

    before = contents(seed)
    assert main(ONE_SEED) == 0
    write(project, stage2={"steps": 2, "group_size": 2})
    capsys.readouterr()
    assert main(ONE_SEED) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "runs/study was started with other parameters (stage2.steps was 1, is 2): name another folder" in said
    write(project)
    assert main(ONE_SEED) == 0
    assert contents(seed) == before, "a refusal costs nothing that was finished"
    assert len(finished(folder)) == len(STEPS)


def test_a_step_that_fails_stops_the_study_with_its_reason(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"kind": "jsonl", "path": "gone.jsonl", "split": "train"}
    write(project, prepare={"sources": [source]})
    assert main(ONE_SEED) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "study: seed-0/prepare" in said
    assert "gone.jsonl" in said
    assert "runs/study/logs/seed-0.prepare.log" in said


def test_an_unknown_arm_is_named_before_anything_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arms", "vanilla", "vismen"]) == 1
    assert "unknown arm 'vismen' (did you mean 'vismem'?)" in capsys.readouterr().err
    assert not (project / "runs").exists()
