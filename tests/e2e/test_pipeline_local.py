"""The Kubeflow pipeline on this machine: killed and run again, like the steps run by hand, refused, released, failed.

The tests stand in the order of one story: later runs keep what earlier ones made, so that each step trains once.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from vismem.config import resolve
from vismem.orchestration import journal as notes
from vismem.serving.environment import DEFAULT_PYTHON, VARIABLE
from vismem.steps import run_step

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "prepare.sources": [{"kind": "scenes", "pretrain": 64, "train": 24, "validation": 12, "test": 24}],
    **{f"base.{name}": 32 for name in ("hidden_size", "vision_width")},
    **{f"base.{name}": 2 for name in ("heads", "vision_layers", "vision_steps")},
    "base.steps": 60,  # an untrained base has no preference between tokens: rounding would decide
    "base.batch_size": 16,
    "memory.builder_layers": 1,
    "memory.builder_heads": 2,
    "stage1.steps": 2,
    "stage1.checkpoint_every": 1,
    "stage1.warm_start": {"steps": 3, "batch_size": 4},
    "stage2.steps": 2,
    **{f"{stage}.{name}": 2 for stage in ("stage1", "stage2") for name in ("batch_size", "group_size")},
    **{f"{section}.max_new_tokens": 8 for section in ("stage1", "stage2", "evaluate")},
    "evaluate.arms": ["vanilla", "vismem"],
    "evaluate.bootstrap": 100,
    "export.parity_items": 2,
}
PASSES = {
    "gate.min_gain": -100,
    "gate.min_gain_low": -100,
    "gate.max_capability_drop": 100,
    "gate.max_time_overhead": 1000,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module go."""
    return tmp_path_factory.mktemp("pipeline")


def command(folder: Path, **overrides: Any) -> list[str]:
    values = {**TINY, **{key.replace("__", "."): value for key, value in overrides.items()}}
    settings = [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
    return [sys.executable, "pipelines/run_local.py", "--profile", "smoke", "--folder", str(folder), *settings]


def environment() -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}, "OMP_NUM_THREADS": "1"}


def run(folder: Path, **overrides: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(folder, **overrides), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    print(done.stdout[-6000:], done.stderr[-3000:], sep="\n")  # shown where a test fails
    return done


def runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("vismem-*"))


def summary(folder: Path) -> str:
    return (runs(folder)[-1] / "summary" / "summary").read_text()


def executed(folder: Path) -> set[str]:
    """The tasks that the last run ran itself; what it kept has no folder in it."""
    return {path.name for path in runs(folder)[-1].iterdir() if (path / "executor_output.json").is_file()}


def descendants(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from descendants(int(child))


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when stage I has gone some of its way."""
    while not list(folder.glob("vismem-*/stage1/stage1.partial/*.checkpoint")):
        assert process.poll() is None, "the run ended before stage I"
        time.sleep(0.02)


def test_a_run_whose_stage_one_is_killed_is_red_and_its_summary_says_so(folder: Path) -> None:
    log = folder / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command(folder), cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        wait_for_checkpoint(folder, process)
        for pid in list(descendants(process.pid)):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 1, log.read_text()[-3000:]
    assert "**stage1 failed**: it ended without a word: killed" in summary(folder)
    assert summary(folder) in log.read_text()
    assert not (runs(folder)[-1] / "stage1" / "stage1").exists()


def test_run_again_it_keeps_what_was_made_and_ends_like_the_steps_run_by_hand(folder: Path, tmp_path: Path) -> None:
    done = run(folder)
    assert done.returncode == 0
    assert not {"prepare", "validate", "base"} & executed(folder)
    made, kept = runs(folder)[1], runs(folder)[0]
    config = resolve("smoke", {}, TINY)
    for step in ("prepare", "validate", "base", "stage1", "stage2", "evaluate"):
        run_step(step, config, tmp_path)
    for step, names in {
        "base": ("model.safetensors",),
        "stage1": ("memory.safetensors", "stage1.csv", "warm_start.csv"),
        "stage2": ("policy.safetensors", "memory.safetensors", "stage2.csv"),
        "evaluate": ("scores.json",),
    }.items():
        for name in names:
            theirs = (kept if step == "base" else made) / step / step / name
            assert theirs.read_bytes() == (tmp_path / step / name).read_bytes(), f"{step}/{name}"
    for arm in ("vanilla", "vismem"):
        file = Path("evaluate") / "predictions" / f"{arm}.parquet"
        assert pq.read_table(made / "evaluate" / file).equals(pq.read_table(tmp_path / file))
    assert scores(made / "evaluate" / "evaluate") == scores(tmp_path / "evaluate")


def scores(folder: Path) -> dict[str, Any]:
    """metrics.json without what a clock measured."""

    def untimed(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        timed = ("seconds_per_sample", "overhead", "stage2_sha256")  # the last covers stage II's own training time
        return {key: untimed(value) for key, value in values.items() if key not in timed}

    found: dict[str, Any] = untimed(json.loads((folder / "metrics.json").read_text()))
    return found


def test_a_refusal_by_the_gate_is_no_failure_and_leaves_a_note(folder: Path) -> None:
    assert {"register", "promote", "not-promoted"} <= executed(folder)
    assert "deploy" not in executed(folder)
    note = (runs(folder)[-1] / "not-promoted" / "note").read_text()
    assert note.startswith("# Not promoted: vismem version 1")
    assert "the overall gain over vanilla" in note
    assert summary(folder).startswith("# The run succeeded")


def test_artifacts_carry_where_they_came_from_and_what_the_page_of_a_run_shows(folder: Path) -> None:
    found: dict[str, dict[str, Any]] = {}
    for file in folder.glob("vismem-*/*/executor_output.json"):
        for name, held in json.loads(file.read_text()).get("artifacts", {}).items():
            found[f"{file.parent.name}.{name}"] = held["artifacts"][0]["metadata"]
            assert Path(held["artifacts"][0]["uri"]).exists(), "what has no file is never kept"
    lineage = json.loads((runs(folder)[-1] / "export" / "export" / "lineage.json").read_text())
    assert (
        found["export.export"]["data_sha256"] == found["validate.validate"]["shards_sha256"] == lineage["data_sha256"]
    )
    assert found["prepare.prepare"]["data_sha256"] == found["validate.validate"]["data_sha256"]
    assert found["register.register"]["manifest_sha256"] == found["export.export"]["manifest_sha256"]
    assert (found["register.register"]["version"], found["register.register"]["verdict"]) == ("1", "refused")
    assert found["promote.promote"]["promoted"] is False
    assert {"vanilla_overall", "vismem_overall", "gain"} <= set(found["evaluate.metrics"])
    assert found["evaluate.yes_no"]["confusionMatrix"]["annotationSpecs"][0] == {"displayName": "yes"}
    assert "<html" in (runs(folder)[-1] / "evaluate" / "report").read_text()
    resolved = yaml.safe_load((runs(folder)[-1] / "configure" / "resolved").read_text())
    assert resolved["base"]["hidden_size"] == 32


@pytest.mark.skipif(
    not Path(os.environ.get(VARIABLE, DEFAULT_PYTHON)).is_file(), reason="no serving environment: `make serving`"
)
def test_another_gate_runs_nothing_before_the_registry_again_and_releases_what_passes(folder: Path) -> None:
    assert run(folder, **{key.replace(".", "__"): value for key, value in PASSES.items()}).returncode == 0
    tasks = {"configure", "preflight", "register", "promote", "deploy", "summary"}
    assert executed(folder) == tasks
    release = json.loads((runs(folder)[-1] / "promote" / "promote" / "release.json").read_text())
    assert (release["promoted"], release["version"]) == (True, "1")
    smoke = json.loads((runs(folder)[-1] / "deploy" / "deploy" / "smoke.json").read_text())
    assert (smoke["promoted"], smoke["version"]) == (True, 1)


def test_a_run_whose_data_are_bad_is_red_with_the_broken_rules_in_its_summary(folder: Path) -> None:
    assert run(folder, validate__min_pixels=500).returncode == 1
    assert executed(folder) == {"configure", "preflight", "summary"}
    assert "**validate failed**: the data breaks" in summary(folder)
    assert "not run" in summary(folder)
    entries = {entry.task: entry.state for entry in notes.read(str(folder / "journal"), runs(folder)[-1].name)}
    assert entries == {"configure": "succeeded", "preflight": "succeeded", "validate": "failed"}


def test_a_run_with_a_wrong_parameter_ends_at_once_and_names_the_right_one(folder: Path) -> None:
    assert run(folder, stage1__stepz=3).returncode == 1
    assert executed(folder) == {"summary"}
    assert "unknown key 'stage1.stepz' (did you mean 'steps'?)" in summary(folder)
