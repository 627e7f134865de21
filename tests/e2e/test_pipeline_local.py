"""The Kubeflow pipeline on this machine: killed and run again, like the steps run by hand, refused, released, failed.

Later runs keep the output of earlier ones, so that each step trains once: fixtures hold the runs of one folder in
their order (killed, then refused by the gate, then released), and any test can be run alone.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from project import PASSES

from vismem.config import resolve
from vismem.registry.tracking import experiment_id, open_store, versions
from vismem.serving.environment import DEFAULT_PYTHON, VARIABLE
from vismem.steps import run_step

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "prepare.sources": [{"kind": "scenes", "train": 24, "validation": 12, "test": 24}],
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
LONG = ("stage1", "stage2", "evaluate")  # steps that keep checkpoints
PLACES = {  # each in the midst of its task's work, in the order of the tasks, since a run keeps what earlier ones made
    "configure": ("configure", "configure/*resolved*"),
    "preflight": ("preflight", "preflight/*report*"),
    "prepare": ("prepare", "prepare.partial/*stats.json*"),
    "validate": ("validate", "validate.partial/data/validation/*part-00000.parquet*"),
    "stage1": ("stage1", "stage1.partial/samples/*000001.jsonl*"),
    "stage2": ("stage2", "stage2.partial/samples/*000001.jsonl*"),
    "evaluate": ("evaluate", "evaluate.partial/*metrics.json*"),
    "export": ("export", "export.partial/onnx/decoder.onnx"),
    "the upload to the registry": ("register", "mlartifacts/models/*/vismem.json"),
    "the verdict": ("register", "register.partial/*verdict.json*"),
}
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


@dataclass(frozen=True)
class Run:
    """A finished run: its exit status, all that it printed, its folder, and the checkpoints that it left behind."""

    status: int
    output: str
    folder: Path
    checkpoints: list[Path] = field(default_factory=list)

    @property
    def summary(self) -> str:
        return (self.folder / "summary" / "summary").read_text()

    @property
    def executed(self) -> set[str]:
        """The tasks that the run finished itself; a task whose output was kept has no folder in it."""
        return {path.name for path in self.folder.iterdir() if (path / "executor_output.json").is_file()}


def command(folder: Path, overrides: dict[str, Any]) -> list[str]:
    settings = [f"--set={key}={json.dumps(value)}" for key, value in {**TINY, **overrides}.items()]
    return [sys.executable, "pipelines/run_local.py", "--profile", "smoke", "--folder", str(folder), *settings]


def environment() -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}, "OMP_NUM_THREADS": "1"}


def run(folder: Path, overrides: dict[str, Any] | None = None, killed_at: str = "") -> Run:
    """Run the pipeline to its end; with `killed_at` a task dies where it begins to write a file at such a place."""
    variables = environment()
    if killed_at:
        (folder / "sitecustomize.py").write_text(KILLER)  # Python imports it in every process
        variables |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "KILLED_AT": f"*/{killed_at}"}
    earlier = set(folder.glob("vismem-*"))
    done = subprocess.run(
        command(folder, overrides or {}), cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    print(done.stdout[-6000:], done.stderr[-3000:], sep="\n")  # shown where a test fails
    (made,) = set(folder.glob("vismem-*")) - earlier
    plain = re.sub(r"\x1b\[\d+m", "", done.stdout + done.stderr)
    return Run(done.returncode, plain, made, list(folder.glob("work/*/*/*.partial/*.checkpoint")))


def made(folder: Path, task: str) -> Path:
    """The folder of the task in the first run that finished it."""
    return min(file.parent for file in folder.glob(f"vismem-*/{task}/executor_output.json"))


def assert_failed(run: Run, task: str) -> None:
    assert run.status == 1
    assert run.summary.startswith("# The run failed")
    assert f"Inner task failed: '{task}'" in run.output
    assert task not in run.executed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of one story go."""
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def killed(folder: Path) -> dict[str, Run]:
    """A run for each of PLACES, killed there."""
    return {name: run(folder, killed_at=place) for name, (_, place) in PLACES.items()}


@pytest.fixture(scope="module")
def refused(folder: Path, killed: dict[str, Run]) -> Run:
    """The run after these, which the gate refuses."""
    return run(folder)


@pytest.fixture(scope="module")
def released(folder: Path, refused: Run) -> dict[str, Run]:
    """With a gate that lets the model pass: a run killed in promote, one in deploy, and one to the end."""
    places = {"promote": "promote.partial/*release.json*", "deploy": "deploy.partial/*smoke.json*", "": ""}
    return {task: run(folder, PASSES, place) for task, place in places.items()}


@pytest.mark.parametrize("name", PLACES)
def test_a_run_of_which_a_task_is_killed_is_red_and_names_it(killed: dict[str, Run], name: str) -> None:
    task = PLACES[name][0]
    assert_failed(killed[name], task)
    kept = {path.parent.name for path in killed[name].checkpoints}
    assert kept == ({f"{task}.partial"} if task in LONG else set()), "long steps resume from a checkpoint"


def test_run_again_it_keeps_what_was_made_and_ends_like_the_steps_run_by_hand(
    folder: Path, refused: Run, tmp_path: Path
) -> None:
    assert refused.status == 0
    assert refused.executed == {"configure", "preflight", "register", "promote", "keep", "summary"}
    assert refused.checkpoints == [], "checkpoints of what was made are gone"
    config = resolve("smoke", TINY)
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


def scores(folder: Path) -> dict[str, Any]:
    """metrics.json without what a clock measured."""

    def untimed(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        timed = ("seconds_per_sample", "overhead", "stage2_sha256")  # the last covers stage II's own training time
        return {key: untimed(value) for key, value in values.items() if key not in timed}

    found: dict[str, Any] = untimed(json.loads((folder / "metrics.json").read_text()))
    return found


@pytest.mark.usefixtures("refused")
def test_a_registration_that_was_killed_leaves_one_version_and_no_run_that_seems_to_run(folder: Path) -> None:
    store = open_store(resolve("smoke", {"registry.tracking_uri": f"sqlite:///{folder}/mlflow.db"}).registry)
    assert [version.version for version in versions(store)] == ["1"]
    ended = [found.info.status for found in store.client.search_runs([experiment_id(store)])]
    assert sorted(ended) == ["FINISHED", "KILLED"]


def test_a_refusal_by_the_gate_is_no_failure_and_leaves_a_note(refused: Run) -> None:
    assert refused.summary.startswith("# The run succeeded")
    note = (refused.folder / "promote" / "note").read_text()
    assert note.startswith("# Not promoted: vismem-smoke version 1")
    assert "the gain's 95 % interval is" in note


def test_artifacts_carry_where_they_came_from_and_what_the_page_of_a_run_shows(folder: Path, refused: Run) -> None:
    found: dict[str, dict[str, Any]] = {}
    for task in ("prepare", "validate", "evaluate", "export", "register", "promote"):
        file = made(folder, task) / "executor_output.json"
        for name, held in json.loads(file.read_text())["artifacts"].items():
            found[f"{task}.{name}"] = held["artifacts"][0]["metadata"]
            assert Path(held["artifacts"][0]["uri"]).exists(), "what has no file is never kept"
    lineage = json.loads((made(folder, "export") / "export" / "lineage.json").read_text())
    shards = found["validate.validate"]["shards_sha256"]
    assert found["export.export"]["data_sha256"] == shards == lineage["data_sha256"]
    assert found["prepare.prepare"]["data_sha256"] == found["validate.validate"]["data_sha256"]
    assert found["register.register"]["manifest_sha256"] == found["export.export"]["manifest_sha256"]
    assert (found["register.register"]["version"], found["register.register"]["verdict"]) == ("1", "refused")
    assert found["promote.promote"]["promoted"] is False
    assert {"vanilla_overall", "vismem_overall", "gain"} <= set(found["evaluate.metrics"])
    assert found["evaluate.yes_no"]["confusionMatrix"]["annotationSpecs"][0] == {"displayName": "yes"}
    assert "<html" in (made(folder, "evaluate") / "report").read_text()
    resolved = yaml.safe_load((refused.folder / "configure" / "resolved").read_text())
    assert resolved["base"]["model"] == "assets/tiny-vlm"


def test_a_run_of_which_the_base_is_killed_is_red_and_names_it(tmp_path: Path) -> None:
    assert_failed(run(tmp_path, killed_at="base.partial/*metrics.json*"), "base")


@SERVED
def test_a_release_and_a_deployment_that_were_killed_are_red_and_leave_no_server(released: dict[str, Run]) -> None:
    for task in ("promote", "deploy"):
        assert_failed(released[task], task)
    partial = released["deploy"].folder / "deploy" / "deploy.partial"
    assert (partial / "tritonserver.log").read_text(), "it was killed when the server had answered"
    seen = psutil.process_iter(["cmdline"])
    servers = [process for process in seen if str(partial) in " ".join(process.info["cmdline"] or ())]
    assert not psutil.wait_procs(servers, timeout=60)[1]


@SERVED
def test_another_gate_runs_nothing_before_the_registry_again_and_releases_what_passes(released: dict[str, Run]) -> None:
    last = released[""]
    assert last.status == 0
    assert last.executed == {"configure", "preflight", "register", "promote", "deploy", "summary"}
    release = json.loads((last.folder / "promote" / "promote" / "release.json").read_text())
    assert (release["promoted"], release["version"]) == (True, "1")
    smoke = json.loads((last.folder / "deploy" / "deploy" / "smoke.json").read_text())
    assert (smoke["promoted"], smoke["version"]) == (True, 1)


def test_a_run_that_is_terminated_takes_the_running_task_with_it(tmp_path: Path) -> None:
    with subprocess.Popen(command(tmp_path, {}), cwd=ROOT, env=environment()) as process:
        tasks: list[psutil.Process] = []
        while not tasks and process.poll() is None:
            tasks = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.05)
        process.terminate()
    assert process.returncode == 130
    assert tasks
    assert not psutil.wait_procs(tasks, timeout=30)[1]


def test_a_run_whose_data_are_bad_is_red_and_says_which_rules_are_broken(tmp_path: Path) -> None:
    failed = run(tmp_path, {"validate.min_pixels": 500})
    assert_failed(failed, "validate")
    assert failed.executed - {"base"} == {"configure", "preflight", "prepare", "summary"}
    assert "the data breaks" in failed.output


def test_a_run_with_a_wrong_parameter_ends_at_once_and_names_the_right_one(tmp_path: Path) -> None:
    failed = run(tmp_path, {"stage1.stepz": 3})
    assert_failed(failed, "configure")
    assert failed.executed == {"summary"}
    assert "unknown key 'stage1.stepz' (did you mean 'stage1.steps'?)" in failed.output


def test_a_run_whose_summary_is_killed_is_red_and_shows_no_other_run_s(tmp_path: Path) -> None:
    run(tmp_path, {"stage1.stepz": 3})
    failed = run(tmp_path, {"stage1.stepz": 3}, killed_at="summary/*summary*")
    assert failed.status == 1
    assert "The run left no summary." in failed.output
