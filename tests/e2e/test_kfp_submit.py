"""`kfp run submit` and what people do around it: the real command line against a stand-in of the API server.

Every `kfp` command in a code block of the README and of docs/ is run as it stands there.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from kfp_api import KfpApi

ROOT = Path(__file__).parents[2]
PIPELINE = "pipelines/vismem.yaml"
COMPILED = "runs/pipeline.yaml"  # what the page compiles for a cluster's settings; the API is the same
COMMAND = r"\s*(\.venv/bin/)?(kfp |python -c .import kfp)"
SUBMIT = f"kfp run submit -f {PIPELINE} -e vismem -r first"


def documented() -> list[str]:
    """The docs' commands for Kubeflow Pipelines, from their code blocks, and the one that must work in any case."""
    found = [SUBMIT]
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [" ".join(line.split()) for line in lines if re.match(COMMAND, line)]
    return list(dict.fromkeys(found))


@pytest.fixture
def server() -> Iterator[KfpApi]:
    with KfpApi() as running:
        yield running


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home without the settings that kfp keeps there."""
    return tmp_path


def run(command: str, home: Path, endpoint: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command line in the project's root, as a shell would."""
    program, *words = shlex.split(command, comments=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KF_", "KFP_", "KUBE"))}
    environment |= {"HOME": str(home), "PYTHONWARNINGS": "ignore"}
    if endpoint:
        environment["KF_PIPELINES_ENDPOINT"] = endpoint
    here = Path(sys.executable).parent / Path(program).name
    return subprocess.run(
        [str(here), *words],
        cwd=ROOT,
        env=environment,
        input="y\n",  # to "are you sure?"
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_documented_command_submits_the_committed_pipeline(server: KfpApi, home: Path) -> None:
    done = run(SUBMIT, home, server.endpoint)
    assert done.returncode == 0, done.stderr
    (experiment,) = server.experiments.values()
    (started,) = server.runs.values()
    assert experiment.display_name == "vismem"
    assert (started.display_name, started.experiment_id) == ("first", experiment.experiment_id)
    assert f"{server.endpoint}/#/runs/details/{started.run_id}" in done.stdout
    assert "Warning: 'submit' is deprecated, use 'create' instead." in done.stderr  # by kfp; it works all the same

    (request,) = server.asked("POST", "runs")
    assert set(request.body) == {"experiment_id", "display_name", "pipeline_spec", "runtime_config"}
    assert request.body["runtime_config"] == {"parameters": {}}
    spec, platform = yaml.safe_load_all((ROOT / PIPELINE).read_text())
    for sent, kept, kind in (
        (request.body["pipeline_spec"]["pipeline_spec"], spec, pipeline_spec_pb2.PipelineSpec),
        (request.body["pipeline_spec"]["platform_spec"], platform, pipeline_spec_pb2.PlatformSpec),
    ):
        assert json_format.ParseDict(sent, kind()) == json_format.ParseDict(kept, kind())


def test_a_second_run_goes_to_the_same_experiment_and_create_is_the_same_as_submit(server: KfpApi, home: Path) -> None:
    assert run(SUBMIT, home, server.endpoint).returncode == 0
    again = SUBMIT.replace("run submit", "run create").replace("kfp ", f"kfp --endpoint {server.endpoint} ")
    done = run(again, home)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    first, second = (request.body for request in server.asked("POST", "runs"))
    assert first == second
    assert len(server.experiments) == 1


def test_parameters_arrive_with_the_types_that_the_pipeline_declares(server: KfpApi, home: Path) -> None:
    overrides = '{"seed": 3, "stage1": {"steps": 30}}'
    given = f"""profile=smoke overrides='{overrides}' image=registry.example.com/vismem-train:0.2.0"""
    done = run(f"{SUBMIT} {given}", home, server.endpoint)
    assert done.returncode == 0, done.stderr
    (request,) = server.asked("POST", "runs")
    assert request.body["runtime_config"]["parameters"] == {
        "profile": "smoke",
        "overrides": {"seed": 3, "stage1": {"steps": 30}},
        "image": "registry.example.com/vismem-train:0.2.0",
    }


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("image=4", "input parameter image requires type string"),  # kfp makes it a number
        ("gpu_count=4", "parameter(s) provided are not required by pipeline: gpu_count"),  # it is compiled in
        ("seed=3", "parameter(s) provided are not required by pipeline: seed"),  # it belongs into overrides
        ("profile", "Expected 'key=value'"),
    ],
)
def test_a_parameter_that_does_not_fit_fails_with_the_reason(
    server: KfpApi, home: Path, given: str, reason: str
) -> None:
    done = run(f"{SUBMIT} {given}", home, server.endpoint)
    assert done.returncode == 1
    assert reason in done.stderr
    assert server.runs == {}


def test_a_server_that_fails_fails_the_command_with_its_reason(server: KfpApi, home: Path) -> None:
    server.fail["POST runs"] = (500, "InternalServerError: the database is gone")
    done = run(SUBMIT, home, server.endpoint)
    assert done.returncode == 1
    assert "the database is gone" in done.stderr


def test_a_server_that_is_not_there_fails_the_command(home: Path) -> None:
    done = run(SUBMIT, home, "http://127.0.0.1:1")
    assert done.returncode == 1
    assert "Connection refused" in done.stderr


def test_a_kubeflow_of_many_users_wants_the_namespace_before_run(home: Path) -> None:
    with KfpApi(multi_user=True) as server:
        refused = run(SUBMIT, home, server.endpoint)
        assert refused.returncode == 1
        assert "empty namespace in multi-user mode" in refused.stderr
        done = run(SUBMIT.replace("kfp ", "kfp -n vismem "), home, server.endpoint)
        assert done.returncode == 0, done.stderr
        assert [experiment.namespace for experiment in server.experiments.values()] == ["vismem"]


def test_watching_tells_the_end_by_words_and_not_by_its_status(home: Path) -> None:
    """So that a script must read the state: `kfp --output json run get RUN_ID`."""
    with KfpApi(outcome="FAILED") as server:
        done = run(f"{SUBMIT} --watch", home, server.endpoint)
        assert (done.returncode, "Run is finished with state FAILED." in done.stdout) == (0, True)
        (run_id,) = server.runs
        state = yaml.safe_load(run(f"kfp --output json run get {run_id}", home, server.endpoint).stdout)["state"]
        assert state == "FAILED"


def test_a_recurring_run_is_off_unless_enabled_and_takes_texts_only(server: KfpApi, home: Path) -> None:
    create = (
        f"kfp recurring-run create --pipeline-package-path {PIPELINE} --experiment-name vismem "
        "--job-name nightly --cron-expression '0 0 2 * * *'"
    )
    assert run(create, home, server.endpoint).returncode == 0
    done = run(f"{create} --enabled profile=smoke", home, server.endpoint)
    assert done.returncode == 0, done.stderr
    off, on = (request.body for request in server.asked("POST", "recurringruns"))
    assert (off["mode"], on["mode"]) == ("DISABLE", "ENABLE")
    assert on["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * *"}}  # the first field is the seconds
    assert (on["max_concurrency"], on["no_catchup"]) == (1, True)
    assert on["runtime_config"]["parameters"] == {"profile": "smoke"}
    refused = run(f"{create} --enabled overrides={{}}", home, server.endpoint)
    assert refused.returncode == 1
    assert "input parameter overrides requires type struct" in refused.stderr


def test_a_run_is_stopped_and_retried_through_the_client(server: KfpApi, home: Path) -> None:
    """`kfp run` has no command for either."""
    run(SUBMIT, home, server.endpoint)
    (run_id,) = server.runs
    for command, state in (("terminate_run('{}')", "CANCELING"), ("runs.run_service_retry_run('{}')", "RUNNING")):
        done = run(f'python -c "import kfp; kfp.Client().{command.format(run_id)}"', home, server.endpoint)
        assert done.returncode == 0, done.stderr
        assert server.runs[run_id].state == state
        server.runs[run_id].state = "FAILED"


def data_json() -> str:
    """The file that the page shows."""
    (shown,) = re.findall(r"^  ```json\n(.*?)^  ```$", (ROOT / "docs" / "cluster.md").read_text(), re.M | re.S)
    return json.dumps(json.loads(shown))


@pytest.mark.parametrize("command", documented())
def test_every_documented_command_works_as_it_stands(server: KfpApi, home: Path, command: str) -> None:
    """RUN_ID and the like stand for what the server knows; addresses for the server's own."""
    create = f"kfp recurring-run create --pipeline-package-path {PIPELINE} --experiment-name vismem --job-name nightly"
    if "RECURRING_RUN_ID" in command:
        run(f"{create} --interval-second 3600", home, server.endpoint)
        command = command.replace("RECURRING_RUN_ID", next(iter(server.recurring_runs)))
    if "RUN_ID" in command or "EXPERIMENT_ID" in command:
        run(SUBMIT, home, server.endpoint)
        command = command.replace("RUN_ID", next(iter(server.runs)))
        command = command.replace("EXPERIMENT_ID", next(iter(server.experiments)))
        if "retry" in command:  # only what has failed can be
            next(iter(server.runs.values())).state = "FAILED"
    command = command.replace('"overrides=$(cat data.json)"', shlex.quote(f"overrides={data_json()}"))
    command = command.replace(COMPILED, PIPELINE)
    command = re.sub(r"--endpoint \S+", f"--endpoint {server.endpoint}", command)
    done = run(command, home, server.endpoint)
    assert done.returncode == 0, done.stderr
