"""The HTTP endpoint, asked by OpenAI's own client: every family's answers, streams, limits, and wrong requests."""

import base64
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
import tiny_families
import tiny_stages
from http_server import served

from vismem.generation.engine import generate
from vismem.generation.invocation import MODES
from vismem.generation.torch_executor import TorchExecutor
from vismem.inference import VisMem
from vismem.models.reference import Base
from vismem.models.vismem import VisMemModel
from vismem.serving import http
from vismem.serving.answering import Runtime
from vismem.serving.http import create_app

LIMIT = 12  # tokens
SAMPLES = tiny.samples()


def url_of(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def messages(images: tuple[bytes, ...], question: str) -> list[dict[str, Any]]:
    shown = [{"type": "image_url", "image_url": {"url": url_of(image)}} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMem:
    return VisMem(tiny_stages.eager_model(tiny_base), Base(str(tiny_base)), tiny_base)


@pytest.fixture(scope="module")
def runtime(model: VisMem) -> Runtime:
    return Runtime(TorchExecutor(model.model), rows=4)


@pytest.fixture(scope="module")
def url(runtime: Runtime) -> Iterator[str]:
    with served(create_app(runtime, "tiny")) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


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


def post(url: str, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data, {"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


GOOD: dict[str, Any] = {"model": "tiny", "messages": messages(SAMPLES[0].images, "what?"), "max_tokens": 2}
PICTURE = GOOD["messages"][0]["content"][0]


def saying(*parts: Any, role: str = "user") -> dict[str, Any]:
    return GOOD | {"messages": [{"role": role, "content": list(parts)}]}


def shown(url: str) -> dict[str, Any]:
    return saying({"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"})


WRONG: dict[str, tuple[int, Any, str]] = {
    "no JSON": (400, b"{", "Invalid JSON"),
    "bytes that are no text": (400, b"\xff\xfe", "Invalid JSON"),
    "a list": (400, b"[]", "the body: "),
    "nothing": (400, {}, "model: Field required"),
    "another model": (404, GOOD | {"model": "gpt"}, "there is no model 'gpt' here, but 'tiny'"),
    "no message": (400, GOOD | {"messages": []}, "messages: "),
    "two turns": (400, GOOD | {"messages": GOOD["messages"] * 2}, "several turns are not supported"),
    "a system's turn": (400, saying(PICTURE, role="system"), "messages.0.role: "),
    "a text as content": (400, GOOD | {"messages": [{"role": "user", "content": "hi"}]}, "messages.0.content: "),
    "an unknown part": (400, saying({"type": "input_audio"}), "messages.0.content.0: "),
    "an unknown field": (400, GOOD | {"tools": []}, "tools: Extra inputs are not permitted"),
    "two answers": (400, GOOD | {"n": 2}, "n: Input should be 1"),
    "nucleus sampling": (400, GOOD | {"top_p": 0.5}, "top_p: Input should be 1"),
    "a negative temperature": (400, GOOD | {"temperature": -1}, "temperature: "),
    "no number": (400, GOOD | {"temperature": "warm"}, "temperature: "),
    "not a number": (400, json.dumps(GOOD | {"temperature": float("nan")}).encode(), "temperature: "),
    "a negative seed": (400, GOOD | {"seed": -1}, "seed: "),
    "a huge seed": (400, GOOD | {"seed": 2**63}, "seed: "),
    "no tokens": (400, GOOD | {"max_tokens": 0}, r"MAX_NEW_TOKENS is 0: it must lie in 1.."),
    "fewer than none": (400, GOOD | {"max_tokens": -1}, r"MAX_NEW_TOKENS is -1: it must lie in 1.."),
    "too many tokens": (400, GOOD | {"max_tokens": 10**6}, "MAX_NEW_TOKENS is 1000000"),
    "five stop strings": (400, GOOD | {"stop": list("abcde")}, "stop"),
    "an unknown memory": (400, GOOD | {"vismem": {"memory": "both"}}, "vismem.memory: "),
    "no image": (400, saying({"type": "text", "text": "what?"}), "IMAGE holds 0 images"),
    "65 images": (400, saying(*[PICTURE] * 65, {"type": "text", "text": "what?"}), "IMAGE holds 65 images"),
    "no question": (400, saying(PICTURE), "PROMPT is empty"),
    "a long question": (400, saying(PICTURE, {"type": "text", "text": "word " * 20_000}), "PROMPT holds 100000 bytes"),
    "half of a character": (400, saying(PICTURE, {"type": "text", "text": "\ud800"}), ""),
    "the model's own token": (400, saying(PICTURE, {"type": "text", "text": "a <m_I^s> b"}), "PROMPT holds <m_I^s>"),
    "an address": (400, shown("http://127.0.0.1/1.png"), "an image must be a data URL"),
    "a file": (400, shown("file:///etc/passwd"), "an image must be a data URL"),
    "broken base64": (400, shown("data:image/png;base64,@@@"), "an image's base64 does not decode"),
    "no image's bytes": (400, shown(url_of(b"hello")), "does not decode: it is no PNG, JPEG, WEBP file"),
    "half of an image": (400, shown(url_of(SAMPLES[0].images[0][:200])), "does not decode"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_request_that_is_wrong_gets_the_reason_and_the_next_one_its_answer(url: str, kind: str) -> None:
    status, body, reason = WRONG[kind]
    found, reply = post(url, body)
    assert (found, reply["error"]["type"]) == (status, "invalid_request_error")
    assert reason in reply["error"]["message"]
    assert post(url, GOOD)[0] == 200


def test_a_body_beyond_the_limit_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_BODY_BYTES", 10_000)
    status, reply = post(url, b" " * 20_000)
    assert (status, reply["error"]["message"]) == (413, "the request is larger than 10000 bytes")


def test_with_a_token_only_who_has_it_is_answered(runtime: Runtime) -> None:
    with served(create_app(runtime, "tiny", token="s3cret")) as address:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer s3cret2"}):
            assert post(address, GOOD, **headers)[0] == 401
        assert post(address, GOOD, Authorization="Bearer s3cret")[0] == 200
        with urllib.request.urlopen(f"{address}/health", timeout=10) as reply:
            assert json.loads(reply.read()) == {"status": "ok"}


def test_an_answer_whose_reader_has_gone_is_decoded_no_further(client: openai.OpenAI, runtime: Runtime) -> None:
    stops, runtime.executor.stops = runtime.executor.stops, frozenset()
    try:
        stream = ask(client, stream=True, max_completion_tokens=2000)
        next(iter(stream))
        stream.close()
        until = time.monotonic() + 20
        while runtime.executor.sources:  # type: ignore[attr-defined]
            assert time.monotonic() < until, "the row is still decoded"
            time.sleep(0.02)
    finally:
        runtime.executor.stops = stops


def test_a_flood_is_refused_beyond_the_queue_and_the_rest_is_answered(
    model: VisMem, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Runtime(TorchExecutor(model.model), rows=4, waiting=2)
    held, join = threading.Event(), few.executor.join
    monkeypatch.setattr(few.executor, "join", lambda *given: (held.wait(20), join(*given))[1])
    with served(create_app(few, "tiny")) as address, ThreadPoolExecutor(12) as pool:
        first = pool.submit(post, address, GOOD)
        while few.waiting or not few.thread:  # it is being read, and holds up the others
            time.sleep(0.01)
        asked = [pool.submit(post, address, GOOD) for _ in range(11)]
        while sum(future.done() for future in asked) < 11 - 2:
            time.sleep(0.01)
        held.set()
        statuses = sorted(future.result()[0] for future in asked)
        assert first.result()[0] == 200
    assert statuses == [200] * 2 + [429] * 9


def test_a_fault_of_the_model_is_said_and_the_next_request_answered(
    url: str, client: openai.OpenAI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runtime.executor, "append", lambda tokens: 1 / 0)
        status, reply = post(url, GOOD)
        assert (status, reply["error"]["type"]) == (500, "server_error")
        assert "ZeroDivisionError" in reply["error"]["message"]
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
