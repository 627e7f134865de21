"""What an endpoint logs of its requests, and that its answers are the same whatever becomes of the log."""

import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_stages
from fastapi.testclient import TestClient
from http_calls import messages

from vismem.data.fingerprint import examine_image
from vismem.generation.torch_executor import TorchExecutor
from vismem.runtime.limits import check_request
from vismem.serving import answering
from vismem.serving.answering import Runtime
from vismem.serving.http import create_app
from vismem.serving.request_log import FOLDER, SHARE, RequestLog

SAMPLES = tiny.samples()[:4]


@pytest.fixture
def runtime(tiny_base: Path) -> Iterator[Runtime]:
    with closing(Runtime(TorchExecutor(tiny_stages.eager_model(tiny_base)), rows=2)) as runtime:
        yield runtime


@pytest.fixture(params=[0, answering.LOGGED])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The pixels that an answer keeps for the log: none, so that all are decoded again, or as they are."""
    monkeypatch.setattr(answering, "LOGGED", request.param)
    return int(request.param)


def logged(runtime: Runtime, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(folder))
    monkeypatch.setenv(SHARE, "1")
    runtime.log = RequestLog.from_environment({"version": "7", "manifest_sha256": "f00d"}, runtime.metrics.logged)


def ask(client: TestClient, number: int, **options: Any) -> Any:
    sample = SAMPLES[number]
    body = {"model": "tiny", "messages": messages(sample.images, sample.question), "max_tokens": 12} | options
    return client.post("/v1/chat/completions", json=body)


def written(runtime: Runtime, folder: Path) -> list[dict[str, Any]]:
    """The lines, once all are written."""
    assert runtime.log is not None
    runtime.log.close()
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


@pytest.mark.usefixtures("kept")
def test_whole_and_streamed_answers_are_logged_as_they_were_sent(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged(runtime, tmp_path, monkeypatch)
    client = TestClient(create_app(runtime, "tiny"))
    replies = [ask(client, number).json() for number in range(4)]
    text = replies[0]["choices"][0]["message"]["content"]
    streamed = ask(client, 0, stream=True, stop=[text[3:5]]).text
    lines = written(runtime, tmp_path)
    for line, reply, sample in zip(lines, replies, SAMPLES, strict=False):
        usage = reply["usage"]
        assert line["question"] == sample.question
        assert line["answer"] == reply["choices"][0]["message"]["content"]
        assert line["finish"] == reply["choices"][0]["finish_reason"]
        assert (line["tokens"], line["prompt_tokens"]) == (usage["completion_tokens"], usage["prompt_tokens"])
        assert line["memories"] == usage["vismem"]["memories"]
        assert len(line["images"]) == len(sample.images)
        assert line["seconds"] > 0
    assert (lines[4]["answer"], lines[4]["finish"]) == (text[: text.index(text[3:5])], "stop")
    assert lines[4]["request"] == lines[0]["request"]
    assert "data: [DONE]" in streamed
    assert len(lines) == 5


def test_large_pictures_are_not_held_while_an_answer_is_decoded(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    logged(runtime, tmp_path, monkeypatch)
    images = check_request(SAMPLES[0].images, b"what?", 12)
    list(runtime.generate(images, "what?", max_new_tokens=12))
    for image in images:
        if kept:
            image.tobytes()
        else:
            with pytest.raises(ValueError, match="closed image"):
                image.tobytes()
    (line,) = written(runtime, tmp_path)
    assert [one["sha256"] for one in line["images"]] == [examine_image(data).sha256.hex() for data in SAMPLES[0].images]


def test_without_a_log_no_picture_is_held_while_an_answer_is_decoded(runtime: Runtime) -> None:
    """Nor what else stood in its file."""
    images = check_request(SAMPLES[0].images, b"what?", 12)
    held = [weakref.ref(image) for image in images]
    with closing(runtime.stream(images, "what?", max_new_tokens=12)) as chunks:
        del images
        gc.collect()
        assert [image() for image in held] == [None] * len(held)
        next(chunks)


def test_probes_refused_requests_and_answers_without_a_reader_are_not_logged(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged(runtime, tmp_path, monkeypatch)
    client = TestClient(create_app(runtime, "tiny"))
    assert client.get("/health").status_code == 200
    assert ask(client, 0, max_tokens=1).status_code == 200
    assert ask(client, 0, max_tokens=0).status_code == 400
    sample = SAMPLES[1]
    chunks = runtime.generate(check_request(sample.images, b"what?", 12), "what?", max_new_tokens=12)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert written(runtime, tmp_path) == []


def test_answers_go_on_where_nothing_can_be_logged_and_a_counter_says_so(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = TestClient(create_app(runtime, "tiny"))
    before = [ask(client, number).json()["choices"] for number in range(4)]
    logged(runtime, Path("/dev/full/log"), monkeypatch)
    assert [ask(client, number).json()["choices"] for number in range(4)] == before
    assert runtime.log is not None
    runtime.log.close()
    assert [ask(client, number).json()["choices"] for number in range(4)] == before  # its thread has ended
    assert 'vismem_logged_total{outcome="lost"} 8.0' in client.get("/metrics").text
