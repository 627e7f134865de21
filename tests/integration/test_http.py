"""The HTTP endpoint, asked by OpenAI's own client: every family's answers, streams, limits, and wrong requests."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
import tiny_families
import tiny_stages
from http_calls import GOOD, endless, ends, messages, post, served

from vismem.generation.engine import generate
from vismem.generation.invocation import MODES
from vismem.generation.torch_executor import TorchExecutor
from vismem.inference import VisMem
from vismem.models.reference import Base
from vismem.models.vismem import VisMemModel
from vismem.serving import guards
from vismem.serving.answering import Runtime
from vismem.serving.http import create_app

LIMIT = 12  # tokens
SAMPLES = tiny.samples()


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMem:
    return VisMem(tiny_stages.eager_model(tiny_base), Base(str(tiny_base)), tiny_base)


@pytest.fixture(scope="module")
def runtime(model: VisMem) -> Runtime:
    return Runtime(TorchExecutor(model.model), rows=4)


def ask(client: openai.OpenAI, sample: Any = SAMPLES[0], **options: Any) -> Any:
    options = {"model": "tiny", "max_completion_tokens": LIMIT} | options
    return client.chat.completions.create(messages=messages(sample.images, sample.question), **options)


@pytest.mark.parametrize("variant", ["qwen2_5_vl", "internvl", "llava_onevision"])
def test_every_family_answers_as_the_engine_does_whole_and_streamed(variant: str, tmp_path: Path) -> None:
    model: VisMemModel = tiny_stages.eager_model(tiny_families.save_base(tmp_path, variant))
    asked = [sample for sample in tiny_families.samples() if sample.images]
    expected = generate(model, asked, MODES["learned"], max_new_tokens=LIMIT)
    assert any(rollout.invocations for rollout in expected)
    with served(create_app(Runtime(TorchExecutor(model)), "tiny")) as address, ThreadPoolExecutor(len(asked)) as pool:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        whole = list(pool.map(lambda sample: ask(client, sample), asked))
        streams = list(pool.map(lambda sample: list(ask(client, sample, stream=True)), asked))
    for rollout, answer, events in zip(expected, whole, streams, strict=True):
        choice = answer.choices[0]
        assert choice.message.content == rollout.text
        kinds = [invocation.kind.value for invocation in rollout.invocations]
        assert [memory["kind"] for memory in answer.vismem["memories"]] == kinds
        assert choice.finish_reason == ("stop" if rollout.finished else "length")
        assert answer.usage.completion_tokens == rollout.answer_length
        assert answer.usage.prompt_tokens > rollout.visual_tokens > 0
        deltas = [event.choices[0] for event in events]
        assert "".join(delta.delta.content or "" for delta in deltas) == rollout.text
        assert [delta.vismem["memory"] for delta in deltas if getattr(delta, "vismem", None)] == kinds
        assert deltas[0].delta.role == "assistant"
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [choice.finish_reason]


def test_requests_choose_sampling_limit_memory_and_stop_strings(client: openai.OpenAI, model: VisMem) -> None:
    sample = SAMPLES[1]
    for memory in ("off", "short", "long", "learned"):
        options = {"max_new_tokens": 9, "temperature": 1.0, "seed": 5}
        mode: Any = {"off": False, "learned": True}.get(memory, memory)
        expected = model.answer(sample.images, sample.question, memory=mode, **options)  # type: ignore[arg-type]
        extra = {"vismem": {"memory": memory}}
        found = ask(client, sample, max_completion_tokens=9, temperature=1.0, seed=5, extra_body=extra)
        assert found.choices[0].message.content.strip() == expected
        assert [m["kind"] for m in found.vismem["memories"]] == [invoked.kind for invoked in expected.invocations]
    text = ask(client, sample).choices[0].message.content
    stop = text[len(text) // 2 :][:9]
    cut = ask(client, sample, stop=["no such text", stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = list(ask(client, sample, stop=stop, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].delta.content or "" for event in streamed[:-1]) == text[: text.index(stop)]
    assert streamed[-1].choices == []
    assert streamed[-1].usage.completion_tokens <= LIMIT
    assert ask(client, sample, max_completion_tokens=2).choices[0].finish_reason == "length"


def test_a_reply_says_where_each_memory_looked_if_that_is_asked(client: openai.OpenAI) -> None:
    extra = {"vismem": {"attention": True}}
    plain, whole = ask(client), ask(client, extra_body=extra)
    memories = whole.vismem["memories"]
    assert [{"kind": m["kind"], "place": m["place"]} for m in memories] == plain.vismem["memories"] != []
    told: list[Any] = []
    kinds = []
    for event in ask(client, extra_body=extra, stream=True):
        said = getattr(event.choices[0], "vismem", None) or {}
        kinds += [said["memory"]] if "memory" in said else []
        told += [said["attention"]] if "attention" in said else []
        assert len(told) <= len(kinds) <= len(told) + 1
    assert told == [memory["attention"] for memory in memories]
    for look in told:
        assert 0 < look["share"] <= 1
        assert sum(weight for grid in look["maps"] for row in grid for weight in row) == pytest.approx(look["share"])


def test_a_body_beyond_the_limit_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "MAX_BODY_BYTES", 10_000)
    status, reply = post(url, b" " * 20_000)
    assert (status, reply["error"]["message"]) == (413, "the request is larger than 10000 bytes")


def test_with_a_token_only_who_has_it_is_answered(runtime: Runtime) -> None:
    with served(create_app(runtime, "tiny", token="s3cret")) as address:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer s3cret2"}):
            status, reply = post(address, GOOD, **headers)
            assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/metrics", "/v1/models", "/nowhere"):
            with pytest.raises(urllib.error.HTTPError, match="401") as refused:
                urllib.request.urlopen(f"{address}{path}", timeout=10)
            assert refused.value.headers["WWW-Authenticate"] == "Bearer"
        assert post(address, GOOD, **{"Host": "x/health?"})[0] == 401, "whatever the path is made of"
        assert post(address, GOOD, Authorization="Bearer s3cret")[0] == 200
        with urllib.request.urlopen(f"{address}/health", timeout=10) as reply:
            assert json.loads(reply.read()) == {"status": "ok"}


def test_an_answer_whose_reader_has_gone_is_decoded_no_further(client: openai.OpenAI, runtime: Runtime) -> None:
    with endless(runtime):
        stream = ask(client, stream=True, max_completion_tokens=2000)
        next(iter(stream))
        stream.close()
        ends(runtime)


def test_a_whole_answer_whose_asker_has_gone_is_decoded_no_further(url: str, runtime: Runtime) -> None:
    """Behind its first token; `test_who_leaves_while_waiting...` leaves before it."""
    place, decoded = f"{url}/v1/chat/completions", runtime.metrics.tokens._value.get
    before = decoded()
    with endless(runtime):
        asked = urllib.request.Request(place, json.dumps(GOOD | {"max_tokens": 2000}).encode())
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(asked, timeout=1.5)
        assert decoded() > before
        ends(runtime)


def held_up(model: VisMem, monkeypatch: pytest.MonkeyPatch, waiting: int) -> tuple[Runtime, threading.Event]:
    """A runtime in which no question joins before the event is set."""
    runtime, held = Runtime(TorchExecutor(model.model), rows=4, waiting=waiting), threading.Event()
    join = runtime.executor.join
    monkeypatch.setattr(runtime.executor, "join", lambda *given: (held.wait(60), join(*given))[1])
    return runtime, held


def test_a_flood_is_refused_beyond_the_queue_and_the_rest_is_answered(
    model: VisMem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an image is decoded."""
    few, held = held_up(model, monkeypatch, waiting=2)
    prepared, prepare = list[int](), few.executor.prepare
    monkeypatch.setattr(few.executor, "prepare", lambda *given: (prepared.append(1), prepare(*given))[1])
    with served(create_app(few, "tiny")) as address, ThreadPoolExecutor(12) as pool:
        first = pool.submit(post, address, GOOD)
        while few.waiting or not few.thread:  # it is being read, and holds up the others
            time.sleep(0.01)
        asked = [pool.submit(post, address, GOOD) for _ in range(11)]
        while sum(future.done() for future in asked) < 12 - 6:
            time.sleep(0.01)
        held.set()
        statuses = sorted(future.result()[0] for future in [first, *asked])
    assert statuses == [200] * 6 + [429] * 6, "four are decoded together, and two wait"
    assert len(prepared) == 6


def test_who_leaves_while_waiting_gives_the_place_to_others(model: VisMem, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Runtime(TorchExecutor(model.model), rows=1, waiting=1)
    with served(create_app(few, "tiny")) as address, endless(few), ThreadPoolExecutor(1) as pool:
        running = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        stream = ask(running, stream=True, max_completion_tokens=2000)
        next(iter(stream))
        place, body = f"{address}/v1/chat/completions", json.dumps(GOOD).encode()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                urllib.request.urlopen(urllib.request.Request(place, body), timeout=0.5)
            until = time.monotonic() + 20
            while len(few.places) > 1:
                assert time.monotonic() < until, "who has left still has a place"
                time.sleep(0.05)
        waits = pool.submit(post, address, GOOD | {"max_tokens": 1})
        stream.close()
        assert waits.result()[0] == 200


def test_a_wrong_request_is_refused_while_many_answers_are_waited_for(
    model: VisMem, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, held = held_up(model, monkeypatch, waiting=60)
    with served(create_app(many, "tiny")) as address, ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(post, address, GOOD) for _ in range(60)]
        until = time.monotonic() + 30
        while len(many.waiting) < 59:
            assert time.monotonic() < until, "some wait for a thread"
            time.sleep(0.01)
        assert post(address, GOOD | {"max_tokens": 0})[0] == 400
        held.set()
        assert {future.result()[0] for future in asked} == {200}


def test_a_fault_of_the_model_is_said_and_the_next_request_answered(
    url: str,
    client: openai.OpenAI,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its kind, that is; the rest is in the log."""
    with monkeypatch.context() as patch:
        patch.setattr(runtime.executor, "append", lambda tokens: 1 / 0)
        status, reply = post(url, GOOD)
        assert (status, reply["error"]["type"]) == (500, "server_error")
        said = re.fullmatch(r"the model failed: ZeroDivisionError \((\w{8}) in .*", reply["error"]["message"])
        assert said
        assert said[1] in caplog.text
        assert "division by zero" in caplog.text
        with pytest.raises(openai.APIError, match="the model failed"):
            list(ask(client, stream=True))
    assert post(url, GOOD)[0] == 200


def test_the_command_serves_the_documentation_s_example_until_it_is_told_to_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [sys.executable, "-m", "vismem.cli", "api", "--port", "0"]
    variables = {**os.environ, "VISMEM_API_TOKEN": "s3cret"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving vismem (qwen2_5_vl) on http://127.0.0.1:")
        (example,) = re.findall(r"```python\n(.*?)```", Path("docs/serving.md").read_text(), flags=re.DOTALL)
        address = line.split()[4].rstrip(",")
        exec(example.replace("http://127.0.0.1:8080/v1", address).replace('"none"', '"s3cret"'), {})
        assert "answer: " in capsys.readouterr().out
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "stopped\n"
    assert process.returncode == 0
