"""The Kubeflow pipeline on this machine: killed and run again, like the steps run by hand, refused, released, failed.

The tests stand in the order of one story: later runs keep what earlier ones made, so that each step trains once.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from vismem.config import resolve
from vismem.orchestration import journal as notes
from vismem.registry.tracking import experiment_id, open_store, versions
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
    "grpo.checkpoint_every": 1,
    "stage1.warm_start": {"steps": 3, "batch_size": 4},
    "stage2.steps": 2,
    **{key: 2 for key in ("grpo.batch_size", "stage1.group_size", "stage2.group_size")},
    **{f"{section}.max_new_tokens": 8 for section in ("grpo", "evaluate")},
    "evaluate.arms": ["vanilla", "vismem"],
    "evaluate.bootstrap": 100,
    "export.parity_items": 2,
}
SERVED = pytest.mark.skipif(
    not Path(os.environ.get(VARIABLE, DEFAULT_PYTHON)).is_file(), reason="no serving environment: `make serving`"
)
PASSES = {
    "gate__min_gain": -100,
    "gate__min_gain_low": -100,
    "gate__max_capability_drop": 100,
    "gate__max_time_overhead": 1000,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module go."""
    return tmp_path_factory.mktemp("pipeline")


def command(folder: Path, **overrides: Any) -> list[str]:
    values = {**TINY, **{key.replace("__", "."): value for key, value in overrides.items()}}
    settings = [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
    return [sys.executable, "pipelines/run_local.py", "--profile", "smoke", "--folder", str(folder), *settings]


KILLER = """
import fnmatch, os, signal, sys

def end(event, arguments):
    \"\"\"Kill this process where it begins to write, or to rename, a file whose path matches KILLED_AT.\"\"\"
    writes = event == "os.rename" or (event == "open" and arguments[1] in ("w", "wb", "x", "xb"))
    if writes and fnmatch.fnmatch(str(arguments[0]), os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)

if "KILLED_AT" in os.environ:
    sys.addaudithook(end)
"""


def environment() -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}, "OMP_NUM_THREADS": "1"}


def run(folder: Path, killed_at: str | None = None, **overrides: Any) -> subprocess.CompletedProcess[str]:
    variables = environment()
    if killed_at:
        (folder / "sitecustomize.py").write_text(KILLER)  # Python imports it in every process
        variables |= {"PYTHONPATH": str(folder), "KILLED_AT": killed_at}
    done = subprocess.run(
        command(folder, **overrides), cwd=ROOT, env=variables, capture_output=True, text=True, check=False
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


def made(folder: Path, task: str) -> Path:
    """The folder of the task in the only run that ran it to its end."""
    (only,) = (file.parent for file in folder.glob(f"vismem-*/{task}/executor_output.json"))
    return only


def kill(folder: Path, task: str, place: str, **overrides: Any) -> None:
    """A run whose `task` is killed in the moment in which it begins to write a file at `place`."""
    assert run(folder, killed_at=f"*/{place}", **overrides).returncode == 1
    assert f"**{task} failed**: it ended without a word: killed" in summary(folder)
    assert not (runs(folder)[-1] / task / "executor_output.json").exists()


PLACES = [  # each in the midst of its task's work; one after the other, since a run keeps what earlier ones made
    ("configure", "configure/resolved"),
    ("preflight", "preflight/report"),
    ("prepare", "prepare.partial/stats.json"),
    ("validate", "validate.partial/data/validation/part-00000.parquet"),
    ("base", "base.partial/language.new"),
    ("stage1", "stage1.partial/samples/000001.jsonl"),
    ("stage2", "stage2.partial/samples/000001.jsonl"),
    ("evaluate", "evaluate.partial/metrics.json"),
    ("export", "export.partial/onnx/decoder.onnx"),
    ("register", "mlartifacts/models/*/vismem.json"),
    ("register", "register.partial/verdict.json"),
    ("not-promoted", "not-promoted/note"),
]


@pytest.mark.parametrize(("task", "place"), PLACES)
def test_a_run_of_which_a_task_is_killed_is_red_and_its_summary_says_so(folder: Path, task: str, place: str) -> None:
    kill(folder, task, place)
    kept = list((folder / "work").glob(f"*/{task}-*/{task}.partial/*.checkpoint"))
    assert bool(kept) == (task in ("base", "stage1", "stage2")), "long steps go on from a checkpoint"


def test_run_again_it_keeps_what_was_made_and_ends_like_the_steps_run_by_hand(folder: Path, tmp_path: Path) -> None:
    assert run(folder).returncode == 0
    assert executed(folder) == {"configure", "preflight", "register", "promote", "not-promoted", "summary"}
    assert not list(folder.glob("work/*/*")), "checkpoints of what was made are gone"
    config = resolve("smoke", {}, TINY)
    for step, names in {
        "prepare": ("stats.json",),
        "validate": ("validation.json",),
        "base": ("model.safetensors",),
        "stage1": ("memory.safetensors", "stage1.csv", "warm_start.csv"),
        "stage2": ("policy.safetensors", "memory.safetensors", "stage2.csv"),
        "evaluate": ("scores.json",),
        "export": ("vismem/memory.safetensors", "onnx/weights.bin", "onnx/decoder.onnx"),
    }.items():
        run_step(step, config, tmp_path)
        for name in names:
            theirs = made(folder, step) / step / name
            assert theirs.read_bytes() == (tmp_path / step / name).read_bytes(), f"{step}/{name}"
    for arm in ("vanilla", "vismem"):
        file = f"evaluate/predictions/{arm}.parquet"
        assert pq.read_table(made(folder, "evaluate") / file).equals(pq.read_table(tmp_path / file))
    assert scores(made(folder, "evaluate") / "evaluate") == scores(tmp_path / "evaluate")


def test_a_registration_that_was_killed_leaves_one_version_and_no_run_that_seems_to_run(folder: Path) -> None:
    store = open_store(resolve("smoke", {}, {"registry.tracking_uri": f"sqlite:///{folder}/mlflow.db"}).registry)
    assert [version.version for version in versions(store)] == ["1"]
    ended = [found.info.status for found in store.client.search_runs([experiment_id(store)])]
    assert sorted(ended) == ["FINISHED", "KILLED"]


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
    lineage = json.loads((made(folder, "export") / "export" / "lineage.json").read_text())
    assert (
        found["export.export"]["data_sha256"] == found["validate.validate"]["shards_sha256"] == lineage["data_sha256"]
    )
    assert found["prepare.prepare"]["data_sha256"] == found["validate.validate"]["data_sha256"]
    assert found["register.register"]["manifest_sha256"] == found["export.export"]["manifest_sha256"]
    assert (found["register.register"]["version"], found["register.register"]["verdict"]) == ("1", "refused")
    assert found["promote.promote"]["promoted"] is False
    assert {"vanilla_overall", "vismem_overall", "gain"} <= set(found["evaluate.metrics"])
    assert found["evaluate.yes_no"]["confusionMatrix"]["annotationSpecs"][0] == {"displayName": "yes"}
    assert "<html" in (made(folder, "evaluate") / "report").read_text()
    resolved = yaml.safe_load((runs(folder)[-1] / "configure" / "resolved").read_text())
    assert resolved["base"]["hidden_size"] == 32


@SERVED
def test_a_release_and_a_deployment_that_were_killed_are_red_and_leave_no_server(folder: Path) -> None:
    kill(folder, "promote", "promote.partial/release.json", **PASSES)
    kill(folder, "deploy", "deploy.partial/smoke.json", **PASSES)
    partial = runs(folder)[-1] / "deploy" / "deploy.partial"
    assert (partial / "tritonserver.log").read_text(), "it was killed when the server had answered"
    seen = psutil.process_iter(["cmdline"])
    servers = [process for process in seen if str(partial) in " ".join(process.info["cmdline"] or ())]
    assert not psutil.wait_procs(servers, timeout=60)[1]


@SERVED
def test_another_gate_runs_nothing_before_the_registry_again_and_releases_what_passes(folder: Path) -> None:
    assert run(folder, **PASSES).returncode == 0
    tasks = {"configure", "preflight", "register", "promote", "deploy", "summary"}
    assert executed(folder) == tasks
    release = json.loads((runs(folder)[-1] / "promote" / "promote" / "release.json").read_text())
    assert (release["promoted"], release["version"]) == (True, "1")
    smoke = json.loads((runs(folder)[-1] / "deploy" / "deploy" / "smoke.json").read_text())
    assert (smoke["promoted"], smoke["version"]) == (True, 1)


def test_a_run_that_is_told_to_end_takes_the_task_at_work_with_it(folder: Path) -> None:
    with subprocess.Popen(command(folder, seed=1), cwd=ROOT, env=environment()) as process:
        tasks: list[psutil.Process] = []
        while not tasks and process.poll() is None:
            tasks = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.05)
        process.terminate()
    assert process.returncode == 130
    assert tasks
    assert not psutil.wait_procs(tasks, timeout=30)[1]


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


def test_a_run_whose_summary_is_killed_is_red_and_shows_no_other_run_s(folder: Path) -> None:
    done = run(folder, killed_at="*/summary/summary", stage1__stepz=3)
    assert done.returncode == 1
    assert "The run left no summary." in done.stdout
