"""`vismem repro` as people see it: real DVC on three steps that are lines of shell; the run in MLflow is real too."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from vismem.cli import main
from vismem.config import RegistryConfig
from vismem.locks import lock_file
from vismem.registry.tracking import experiment_id, open_store
from vismem.workspace import make_workspace

ROOT = Path(__file__).parents[2]
MADE = "mkdir -p artifacts/{name} && echo made {name} && date > artifacts/{name}/date"


class Workspace:
    """A project with the steps prepare, stage1 and register, each after the one before it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / ".dvc").mkdir()
        (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
        (root / "data").write_text("1")
        (root / "params.yaml").write_text("seed: 0\n")
        self.write()

    def write(self, **commands: str) -> None:
        """Write dvc.yaml; each step makes its output, or runs the command given for it."""
        stages, before = {}, "data"
        for name in ("prepare", "stage1", "register"):
            command, out = commands.get(name, MADE.format(name=name)), f"artifacts/{name}"
            stages[name] = {"cmd": command, "deps": [before], "outs": [{out: {"persist": True}}]}
            before = out
        (self.root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))

    def runs(self, of: str | None = None) -> list[tuple[str, str]]:
        """Id and status of the runs in MLflow, or name and status of the runs of one's stages."""
        store = open_store(RegistryConfig(tracking_uri=f"sqlite:///{self.root}/mlflow.db"))
        found = store.client.search_runs([experiment_id(store)])
        mine = [run for run in found if run.data.tags.get("mlflow.parentRunId") == of]
        return [(run.info.run_name if of else run.info.run_id, run.info.status) for run in mine]


@pytest.fixture
def workspace(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "global"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    return Workspace(tmp_path)


@pytest.fixture
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run in MLflow, which takes seconds to import."""
    monkeypatch.setattr("vismem.registry.live_run.BEFORE", [])


def until(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.05)
    assert condition()  # type: ignore[operator]


@pytest.mark.usefixtures("untracked")
def test_a_run_counts_its_steps_and_shows_what_each_says_and_nothing_of_dvc_s(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["repro"]) == 0
    out, err = capfd.readouterr()
    lines = re.sub(r", (about \d+|under 1) min left", ", TIME left", out).splitlines()
    assert lines[:-1] == [
        "step 1 of 3: prepare, TIME left",
        "made prepare",
        "step 2 of 3: stage1, TIME left",
        "made stage1",
        "step 3 of 3: register, TIME left",
        "made register",
    ]
    assert re.fullmatch(r"done in \d+ s", lines[-1])
    assert err == ""

    workspace.write(register=f"true && {MADE.format(name='register')}")
    assert main(["repro"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[:2] == ["step 1 of 3: prepare, unchanged", "step 2 of 3: stage1, unchanged"]
    assert lines[2].startswith("step 3 of 3: register, under 1 min left"), "as long as it took before"

    assert main(["repro"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "nothing to do: every step is unchanged"
    assert main(["repro", "--quiet", "--force"]) == 0
    assert capfd.readouterr().out == "made prepare\nmade stage1\nmade register\n"


@pytest.mark.usefixtures("untracked")
def test_the_error_of_the_step_that_fails_is_the_last_line(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace.write(stage1="echo 'vismem stage1: no luck' >&2 && exit 1")
    assert main(["repro"]) == 1
    out, err = capfd.readouterr()
    assert err == "vismem stage1: no luck\n"
    assert "register" not in out


@pytest.mark.usefixtures("untracked")
def test_a_step_that_is_killed_cannot_say_so_itself(workspace: Workspace, capfd: pytest.CaptureFixture[str]) -> None:
    workspace.write(stage1="kill -9 $$")
    assert main(["repro"]) == 1
    assert "stage1 ended with status -9, killed by SIGKILL (often for want of memory)" in capfd.readouterr().err


@pytest.mark.usefixtures("untracked")
def test_what_dvc_refuses_is_one_line(workspace: Workspace, capfd: pytest.CaptureFixture[str]) -> None:
    (workspace.root / "data").unlink()
    assert main(["repro"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("vismem repro: ")
    assert "data" in line
    assert main(["repro", "stage7"]) == 1
    assert "stage7" in capfd.readouterr().err.splitlines()[-1]
    for arguments in (["--dry"], ["--dry", "stage7"]):
        assert main(["repro", *arguments]) == 1
        assert capfd.readouterr().err.splitlines()[-1].startswith("vismem repro: ")
    (workspace.root / "dvc.yaml").write_text("stages: a: b")
    assert main(["repro"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "dvc.yaml" in line


@pytest.fixture
def running(workspace: Workspace) -> Iterator["subprocess.Popen[bytes]"]:
    """A `vismem repro` in another process, in the midst of stage1."""
    workspace.write(stage1=f"touch started && (test -e go || exec sleep 300) && {MADE.format(name='stage1')}")
    command = [sys.executable, "-m", "vismem.cli", "repro"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        until((workspace.root / "started").exists)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_second_run_is_told_who_is_at_work_and_changes_nothing_and_a_killed_one_leaves_no_lock(
    workspace: Workspace, running: "subprocess.Popen[bytes]", capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["repro"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"vismem repro: this folder is in use by process {running.pid} since [-0-9]+ [:0-9]+: "
        rf"wait for it, or end it \(`kill {running.pid}`\)",
        line,
    )
    assert running.poll() is None
    until(lambda: [status for _, status in workspace.runs()] == ["RUNNING"])

    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    until(lambda: [status for _, status in workspace.runs()] == ["KILLED"])
    ((run_id, _),) = workspace.runs()
    assert ("stage1", "KILLED") in workspace.runs(of=run_id)
    (workspace.root / "go").touch()
    assert main(["repro"]) == 0
    out, err = capfd.readouterr()
    assert "step 1 of 3: prepare, unchanged" in out
    assert err == "", "DVC has cleared its lock away silently"


def test_a_run_that_is_terminated_takes_its_step_with_it(
    workspace: Workspace, running: "subprocess.Popen[bytes]"
) -> None:
    import psutil

    steps = psutil.Process(running.pid).children(recursive=True)
    for _ in range(4):  # `timeout` sends two, to the process and to its group
        running.terminate()
        time.sleep(0.05)
    assert running.wait(60) == 143
    assert json.loads((workspace.root / ".dvc" / "tmp" / "rwlock").read_text()) == {}, "DVC's note is whole"
    assert psutil.wait_procs(steps, timeout=60)[1] == []
    until(lambda: [status for _, status in workspace.runs()] == ["KILLED"])


def test_register_gets_the_run_that_the_training_opened_and_a_run_of_nothing_opens_none(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    curve = "printf 'step,loss\\r\\n0,0.5\\r\\n1,0.25\\r\\n' > artifacts/stage1/warm_start.csv"
    workspace.write(
        stage1=f"{MADE.format(name='stage1')} && {curve}",
        register=f"{MADE.format(name='register')} && echo $VISMEM_LIVE_RUN > artifacts/register/run",
    )
    assert main(["repro"]) == 0
    ((run_id, _),) = workspace.runs()
    assert (workspace.root / "artifacts" / "register" / "run").read_text().strip() == run_id
    until(lambda: workspace.runs() == [(run_id, "FINISHED")])
    store = open_store(RegistryConfig(tracking_uri=f"sqlite:///{workspace.root}/mlflow.db"))
    points = store.client.get_metric_history(run_id, "warm_start/loss")
    assert [(point.step, point.value) for point in points] == [(0, 0.5), (1, 0.25)]
    assert sorted(workspace.runs(of=run_id)) == [("prepare", "FINISHED"), ("stage1", "FINISHED")]
    (stage,) = store.client.search_runs([experiment_id(store)], "attributes.run_name = 'stage1'")
    assert (stage.data.metrics["warm_start/loss"], stage.data.params["stage1.steps"]) == (0.25, "20")
    assert "VISMEM_LIVE_RUN" not in os.environ
    assert main(["repro"]) == 0
    workspace.write(stage1="exit 1")
    assert len(workspace.runs()) == 1
    assert main(["repro"]) == 1
    until(lambda: sorted(status for _, status in workspace.runs()) == ["FAILED", "FINISHED"])
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("untracked")
def test_a_run_needs_the_space_that_the_profile_asks_for_and_a_run_of_nothing_needs_none(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    params = workspace.root / "params.yaml"
    params.write_text("preflight: {free_disk_gb: 1.0e+9}\n")
    assert main(["repro"]) == 1
    assert re.search(
        r"too little disk space for a run: .* GB free at .*, 1e\+09 GB asked for; free some", capfd.readouterr().err
    )
    assert not (workspace.root / "artifacts").exists()
    params.write_text("seed: 0\n")
    assert main(["repro"]) == 0
    params.write_text("preflight: {free_disk_gb: 1.0e+9}\n")
    assert main(["repro"]) == 0


@pytest.mark.usefixtures("untracked")
def test_a_full_disk_under_dvc_s_own_cache_is_one_line(
    workspace: Workspace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", ".dvc/cache/files/md5/12/34")

    monkeypatch.setattr("dvc.output.Output.save", full)
    assert main(["repro"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("vismem repro: cannot write .dvc/cache/files/md5/12/34, the disk is full: ")


@pytest.mark.usefixtures("untracked")
def test_a_profile_s_run_is_known_by_its_folder(workspace: Workspace, capfd: pytest.CaptureFixture[str]) -> None:
    (workspace.root / "deploy" / "profiles").mkdir(parents=True)
    (workspace.root / "deploy" / "profiles" / "toy.yaml").write_text("seed: 3\n")
    with lock_file(workspace.root / "runs" / "toy" / ".dvc" / "tmp" / "vismem" / "lock", "test"):
        assert main(["repro", "--profile", "toy"]) == 1
    assert "vismem repro: runs/toy is in use by process" in capfd.readouterr().err


@pytest.mark.usefixtures("untracked")
def test_a_workspace_in_which_a_run_is_keeps_the_parameters_that_its_next_steps_will_read(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    profile = workspace.root / "deploy" / "profiles" / "toy.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("seed: 3\n")
    made = make_workspace(workspace.root / "params.yaml", "toy")
    before = (made / "params.yaml").read_text()
    with lock_file(made / ".dvc" / "tmp" / "vismem" / "lock", "test"):
        assert make_workspace(workspace.root / "params.yaml", "toy") == made, "nothing is to be changed"
        profile.write_text("seed: 9\n")
        assert main(["repro", "--profile", "toy"]) == 1
        assert "vismem repro: runs/toy is in use by process" in capfd.readouterr().err
        assert (made / "params.yaml").read_text() == before
    make_workspace(workspace.root / "params.yaml", "toy")
    assert (made / "params.yaml").read_text() != before
