"""The request log behind a real tritonserver: what its model writes, and that answers do not depend on it."""

import json
from pathlib import Path

import pytest
import tiny

from vismem.provenance import MANIFEST, sha256_file
from vismem.serving.client import Client
from vismem.serving.exchange import Answer
from vismem.serving.request_log import FOLDER, IMAGES, SHARE
from vismem.serving.server import triton_server
from vismem.validation.requests import read_requests

SAMPLES = tiny.samples()[:3]


def answers(deployed: Path, log: Path) -> list[Answer]:
    """Of the samples, from a server of its own, which has ended then; the server was asked whether it is ready, too."""
    with triton_server(deployed / "model_repository", log=log) as server:
        client = Client(f"grpc://{server.grpc_url}")
        return [client.ask(sample.images, sample.question, max_new_tokens=12) for sample in SAMPLES]


def test_triton_logs_the_requests_that_it_answered_and_answers_without_a_log(
    deployed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "requests"
    for name, value in (FOLDER, str(folder)), (SHARE, "1"), (IMAGES, "1"):
        monkeypatch.setenv(name, value)
    given = answers(deployed, tmp_path / "log")
    rows, unreadable = read_requests(folder, days=1)
    assert unreadable == 0
    assert list(rows["question"]) == [sample.question for sample in SAMPLES]
    assert list(rows["tokens"]) == [answer.tokens for answer in given]
    assert list(rows["memories"]) == [len(answer.invocations) for answer in given]
    (bundle,) = deployed.glob(f"model_repository/*/*/bundle/{MANIFEST}")
    assert set(rows["manifest_sha256"]) == {sha256_file(bundle)}
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert [line["answer"].strip() for line in lines] == given
    assert {line["version"] for line in lines} == {bundle.parents[1].name}
    kept = {path.stem for path in (folder / "images").iterdir()}
    assert kept == {image["sha256"] for line in lines for image in line["images"]}
    monkeypatch.setenv(FOLDER, "/dev/full/requests")
    assert answers(deployed, tmp_path / "log") == given
