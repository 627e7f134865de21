"""Preflight, against a real S3 server, a real MLflow store on SQLite, and services that are dead or hang."""

import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from botocore.exceptions import BotoCoreError, ClientError

from vismem.cli import main
from vismem.config import Config, parse_config
from vismem.errors import UserError
from vismem.params_file import render_params
from vismem.preflight import (
    Finding,
    check_base,
    check_bucket,
    check_disk,
    check_gpus,
    check_registry,
    check_shared_memory,
    check_variable,
    checks,
    markdown,
    preflight,
)
from vismem.registry import tracking
from vismem.services import HOST, NotYetError, free_ports, start_service
from vismem.stack import S3_INNER, seaweedfs_command

KEYS = {"owner": ["Admin"], "reader": ["Read:data", "List:data"]}  # SeaweedFS's names of rights


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server with the bucket `data`, its `owner` and a `reader`; each one's key is its name."""
    folder, ports = tmp_path_factory.mktemp("s3"), free_ports(dict.fromkeys(("s3", *S3_INNER), 0))
    people = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": f"{name}-secret"}], "actions": rights}
        for name, rights in KEYS.items()
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": people}))
    weed = shutil.which("weed", path=str(Path(sys.executable).parent))
    assert weed is not None
    command = [*seaweedfs_command(weed, folder, ports), f"-s3.config={folder / 's3.json'}"]
    server = start_service("s3", command, os.environ, folder / "log", stop_signal=signal.SIGKILL)
    address = f"http://{HOST}:{ports['s3']}"
    keys = {"aws_access_key_id": "owner", "aws_secret_access_key": "owner-secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=address, **keys)

    def make_bucket() -> None:
        try:
            client.create_bucket(Bucket="data")
        except (BotoCoreError, ClientError) as error:
            raise NotYetError(str(error)) from None

    with server:
        server.wait_until(make_bucket)
        yield address


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store, made once: that takes MLflow seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def owner(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "owner")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "owner-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return s3


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_laptop_passes_with_the_defaults(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    findings = preflight(Config(), tmp_path / "artifacts", tmp_path / "report" / "preflight.md")
    assert [finding.name for finding in findings] == [
        "registry",
        "base model assets/tiny-vlm",
        "GPUs",
        "disk",
        "shared memory",
    ]
    assert all(finding.ok for finding in findings)
    assert "All 5 checks passed" in (tmp_path / "report" / "preflight.md").read_text()
    files = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert list(files.iterdir()) == []  # the probe is gone
    assert not (tmp_path / "artifacts").exists()


def test_all_failures_are_told_at_once_each_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.delenv("VISMEM_NO_SUCH_SECRET", raising=False)
    wanted = {"environment": ["VISMEM_NO_SUCH_SECRET"], "free_disk_gb": 1e9, "shared_memory_gb": 1e9}
    config = parse_config({"preflight": wanted, "base": {"model": str(tmp_path)}})
    report = tmp_path / "report.md"
    with pytest.raises(UserError, match="5 of 6 checks failed") as failed:
        preflight(config, tmp_path, report)
    said, table = str(failed.value), report.read_text()
    for name in ("variable VISMEM_NO_SUCH_SECRET", "registry", f"base model {tmp_path}", "disk", "shared memory"):
        assert re.search(rf"\(\d\) {re.escape(name)}: ", said)
        assert f"| {name} | **failed** |" in table
    assert "| GPUs | ok | none asked for |  |" in table
    assert "set VISMEM_NO_SUCH_SECRET" in said
    assert "lower preflight.free_disk_gb" in table


def test_every_row_of_the_report_has_four_cells() -> None:
    table = markdown([Finding("a", True, "x|y\nz"), Finding("b", False, "seen", "do")])
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert [len(re.split(r"(?<!\\)\|", row)) for row in rows] == [6, 6, 6, 6]
    assert "**1 of 2 checks failed**" in table


def test_the_value_of_a_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISMEM_SECRET", "hunter2")
    assert check_variable("VISMEM_SECRET") == Finding("variable VISMEM_SECRET", True, "set")
    monkeypatch.setenv("VISMEM_SECRET", "hunter2\n")
    finding = check_variable("VISMEM_SECRET")
    assert not finding.ok
    assert "hunter2" not in str(finding)
    assert "white space" in finding.seen
    monkeypatch.setenv("VISMEM_SECRET", " ")
    assert check_variable("VISMEM_SECRET").seen == "empty"


@pytest.mark.parametrize("bucket", ["data", "data/some/prefix", "s3://data/some/prefix/"])
def test_a_bucket_is_written_and_left_as_it_was(owner: str, bucket: str) -> None:
    finding = check_bucket(bucket)
    assert finding.ok, finding
    assert owner in finding.seen
    client = boto3.client("s3")
    assert client.list_objects_v2(Bucket="data")["KeyCount"] == 0


def test_a_bucket_that_is_not_there_is_said_so(owner: str) -> None:
    finding = check_bucket("other")
    assert not finding.ok
    assert "could not find it" in finding.seen
    assert "404" in finding.seen
    assert "s3://other" in finding.remedy


def test_a_key_that_may_only_read_is_found_out(owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reader-secret")
    finding = check_bucket("data")
    assert not finding.ok
    assert "could not write to it" in finding.seen
    assert "403" in finding.seen


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "silent", "no address"])
def test_a_dead_s3_endpoint_is_told_after_one_try(silent: str, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Seconds: one connection, no retries (boto3 would make four, of a minute each)."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", silent if address == "silent" else address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "owner")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "owner-secret")
    monkeypatch.setattr("vismem.preflight.ANSWER_SECONDS", 1)
    tries = []
    make = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda *given: (tries.append(given[1]), make(*given))[1])
    finding = check_bucket("data")
    assert not finding.ok
    assert "AWS_ENDPOINT_URL_S3" in finding.remedy
    assert len(tries) == (0 if address == "no address" else 1)


def test_an_mlflow_server_that_hangs_is_told_in_seconds(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.setitem(tracking.IMPATIENT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    finding = check_registry(Config().registry)
    assert not finding.ok
    assert f"the MLflow store {silent} does not answer" in finding.seen
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_a_registry_that_answers_but_takes_no_files_is_found_out(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    (tmp_path / "file").write_text("no folder")
    values = {"experiment": "elsewhere", "artifact_location": str(tmp_path / "file" / "x")}
    finding = check_registry(parse_config({"registry": values}).registry)
    assert not finding.ok
    assert "answers, but takes no files" in finding.seen


@pytest.mark.parametrize("store", ["sqlite:///README.md", "http://[::1", "mysql://user:secret@127.0.0.1/db"])
def test_a_store_that_is_none_or_has_no_driver_here_fails_a_check_and_not_the_preflight(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    finding = check_registry(parse_config({"registry": {"tracking_uri": store}}).registry)
    assert (finding.ok, finding.seen != "") == (False, True)


def test_a_base_model_in_a_folder_must_be_of_a_known_family(tmp_path: Path) -> None:
    assert "no config.json" in check_base(str(tmp_path)).seen
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    assert check_base(str(tmp_path)) == Finding(f"base model {tmp_path}", True, "a folder with a qwen2_5_vl")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "model family 'llama' is not supported" in check_base(str(tmp_path)).seen
    (tmp_path / "config.json").write_text("[]")
    assert "model family 'None' is not supported" in check_base(str(tmp_path)).seen


def test_a_hub_that_cannot_be_reached_is_not_waited_for_and_the_cache_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/{revision}/{filename}")
    tries = []
    make = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda *given: (tries.append(given[1]), make(*given))[1])
    finding = check_base("someone/model")
    assert not finding.ok
    assert "the hub does not answer, and the cache has no someone/model" in finding.seen
    assert len(tries) <= 2  # the download itself would try six times, for half a minute
    kept = tmp_path / "models--someone--model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("c0ffee")
    (kept / "snapshots" / "c0ffee").mkdir(parents=True)
    (kept / "snapshots" / "c0ffee" / "config.json").write_text('{"model_type": "internvl"}')
    finding = check_base("someone/model")
    assert finding.ok, finding
    assert finding.seen == "a internvl in the cache; the hub does not answer"


def test_what_is_no_model_name_is_said_so() -> None:
    assert not check_base("no/such/folder").ok


def test_gpus_that_are_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.cuda.device_count()
    assert check_gpus(0).ok
    assert check_gpus(there).ok
    assert not check_gpus(there + 1).ok
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in check_gpus(1).seen
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert check_gpus(1).seen == "none"


def test_disk_and_shared_memory_are_measured_where_the_run_writes(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 1e9
    assert check_disk(tmp_path / "not" / "yet", free / 2).ok
    assert not check_disk(tmp_path / "not" / "yet", free * 2).ok
    assert str(tmp_path) in check_disk(tmp_path / "not" / "yet", 0).seen
    assert not check_shared_memory(1, tmp_path / "nowhere").ok
    assert check_shared_memory(0).ok


def test_the_command_prints_each_check_and_fails_with_the_reasons(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    (tmp_path / "params.yaml").write_text(render_params(Config()))
    assert main(["preflight"]) == 0
    assert "ok      registry: " in capsys.readouterr().out
    (tmp_path / "params.yaml").write_text(render_params(parse_config({"preflight": {"free_disk_gb": 1e9}})))
    assert main(["preflight"]) == 1
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["ok", "ok", "ok", "FAILED", "ok"]
    assert "FAILED  disk: " in said.out
    assert said.err.startswith("vismem preflight: 1 of 5 checks failed: (1) disk: ")


def test_checks_are_only_listed_until_they_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    todo = checks(parse_config({"preflight": {"buckets": ["a", "b"], "environment": ["HOME"]}}), Path("artifacts"))
    assert len(todo) == 8
    assert todo[0]().ok
