"""What OpenAI's package, and tools that speak as it does, send and read beside a question."""

import json
import logging
import re
import socket
import time
import urllib.error
import urllib.request
from typing import Any, get_type_hints
from urllib.parse import urlsplit

import openai
import pytest
import tiny
from http_calls import GOOD, post
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

from vismem.serving import guards
from vismem.serving.answering import Runtime
from vismem.serving.client import Client
from vismem.serving.completion import Reply, read_body
from vismem.serving.pieces import Chunk

LONG = [{"role": "assistant", "content": "word " * 9_000}, {"role": "user", "content": "what?"}]
KIND = {"role": "user", "content": [{"type": "a" * 100_000}]}


def test_null_says_as_little_as_a_field_that_is_not_there(url: str) -> None:
    known = get_type_hints(CompletionCreateParamsNonStreaming).keys() | {"stream"}
    nulls: dict[str, Any] = dict.fromkeys(known - {"model", "messages", "max_tokens"})
    assert len(nulls) > 30
    nulls["vismem"] = {"memory": None, "attention": None}
    expected, found = post(url, GOOD), post(url, GOOD | nulls)
    assert expected[0] == found[0] == 200
    assert found[1]["choices"] == expected[1]["choices"]
    assert post(url, GOOD | {"vismem": None, "stream_options": {"include_usage": None}})[0] == 200
    for wrong in ({"model": None}, {"messages": None}, {"best_of": None}):
        assert post(url, GOOD | wrong)[0] == 400, wrong


def test_what_asks_for_nothing_is_taken(url: str) -> None:
    neutral: dict[str, Any] = {
        "n": 1,
        "top_p": 1.0,
        "logit_bias": {},
        "top_logprobs": 0,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tools": [],
        "tool_choice": "none",
        "functions": [],
        "function_call": "auto",
        "parallel_tool_calls": True,
        "reasoning_effort": "none",
        "verbosity": "medium",
        "store": False,
        "metadata": {"team": "a"},
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "user": "x",
        "stream_options": {"include_obfuscation": True},
    }
    named = {"messages": [GOOD["messages"][0] | {"name": "bob"}]}
    status, reply = post(url, GOOD | neutral | named)
    assert status == 200, reply
    assert reply["choices"] == post(url, GOOD)[1]["choices"]


def test_turns_of_one_role_in_a_row_are_one(url: str) -> None:
    shown, asked = GOOD["messages"][0]["content"]
    turns = [
        {"role": "system", "content": "be"},
        {"role": "developer", "content": "brief"},
        {"role": "user", "content": [shown]},
        {"role": "user", "content": [asked]},
    ]
    joined = [{"role": "system", "content": "be\nbrief"}, {"role": "user", "content": [shown, asked]}]
    found, expected = (post(url, GOOD | {"messages": messages, "max_tokens": 9})[1] for messages in (turns, joined))
    assert found["choices"] == expected["choices"]
    assert found["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("wrong", "field", "code"),
    [
        ({"messages": [{"role": "user", "content": "what?"}]}, "messages", None),
        ({"messages": [GOOD["messages"][0] | {"content": GOOD["messages"][0]["content"][:1]}]}, "messages", None),
        ({"stop": list("abcde")}, "stop", None),
        ({"stop": "a" * 300}, "stop", None),
        ({"max_tokens": 10**6}, "max_tokens", None),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", None),
        ({"model": "gpt"}, "model", "model_not_found"),
        ({"messages": [*GOOD["messages"], *LONG]}, "messages", "context_length_exceeded"),
    ],
)
def test_a_refusal_names_the_parameter_in_openai_s_words(url: str, wrong: Any, field: str, code: str | None) -> None:
    error = post(url, GOOD | wrong)[1]["error"]
    assert (error["param"], error["code"]) == (field, code)
    assert not re.search("[A-Z]{4}", error["message"]), "Triton's words"


@pytest.mark.parametrize(
    "wrong", [{"model": "a" * 100_000}, {"a" * 100_000: 1}, {"user": "a" * 100_000}, {"messages": [KIND]}]
)
def test_what_is_too_long_is_not_sent_back(url: str, wrong: Any) -> None:
    status, reply = post(url, GOOD | wrong)
    assert status == 400
    assert len(str(reply)) < 2_000


def test_headers_tell_clients_and_proxies_what_to_do(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(method: str, path: str, data: bytes | None = None) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{url}{path}", data, method=method), timeout=30
            ) as reply:
                return reply.status, reply.headers
        except urllib.error.HTTPError as error:
            return error.code, error.headers

    place, streamed = "/v1/chat/completions", json.dumps(GOOD | {"stream": True}).encode()
    status, headers = asked("POST", place, streamed)
    assert (status, headers["Cache-Control"], headers["X-Accel-Buffering"]) == (200, "no-cache", "no")
    monkeypatch.setattr(guards, "MAX_BODIES", 0)
    status, headers = asked("POST", place, streamed)
    assert (status, 1 <= int(headers["Retry-After"]) <= 5) == (429, True)
    status, headers = asked("GET", place)
    assert (status, headers["Allow"]) == (405, "POST")
    assert asked("POST", f"{place}/", streamed)[0] == 404, "not led to a host that the request names"
    assert [asked("HEAD", path)[0] for path in ("/v1/models", "/v1/models/tiny", "/v1/models/x")] == [200, 200, 404]


def test_a_conversation_goes_on_from_a_reply_that_was_written_out(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**GOOD)
    turns = [*GOOD["messages"], first.choices[0].message.model_dump(), {"role": "user", "content": "and now?"}]
    second = client.chat.completions.create(**GOOD | {"messages": turns})
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_without_a_seed_every_answer_is_drawn_anew(url: str) -> None:
    def answers(**options: Any) -> set[str]:
        asked = GOOD | {"temperature": 2.0, "max_tokens": 12} | options
        return {post(url, asked)[1]["choices"][0]["message"]["content"] for _ in range(4)}

    assert len(answers()) > 1
    assert len(answers(seed=0)) == len(answers(seed=2**63 - 1)) == len(answers(seed=-(2**63) + 1)) == 1


def test_an_event_is_one_line_whatever_an_answer_holds() -> None:
    text = "a\u2028b\u2029c\x85d\x0be"
    wanted = read_body(json.dumps(GOOD).encode())
    ((data, end),) = (event.splitlines() for event in Reply("tiny", wanted).events(Chunk(text, "token", 1)))
    assert end == ""
    assert json.loads(data.removeprefix("data: "))["choices"][0]["delta"]["content"] == text


def test_a_stop_text_may_be_alone(url: str) -> None:
    client, asked = Client(f"{url}/v1", model="tiny"), tiny.samples()[0]
    text = str(client.ask(asked.images, asked.question, max_new_tokens=12))
    stop = text[len(text) // 2 :][:6]
    assert client.ask(asked.images, asked.question, max_new_tokens=12, stop=stop) == text[: text.index(stop)]


def test_models_are_found_one_by_one_and_what_is_unknown_is_said_as_openai_says_it(
    url: str, client: openai.OpenAI
) -> None:
    for model in client.models.list():
        assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="there is no model 'org/other' here, but 'tiny'"):
        client.models.retrieve("org/other")
    assert json.loads(urllib.request.urlopen(f"{url}/v1/models/", timeout=10).read())["object"] == "list"
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        with pytest.raises(urllib.error.HTTPError) as failed:
            urllib.request.urlopen(urllib.request.Request(f"{url}{path}", method=method), timeout=10)
        assert failed.value.status == status
        assert json.loads(failed.value.read())["error"]["message"]
    with urllib.request.urlopen(urllib.request.Request(f"{url}/health", method="HEAD"), timeout=30) as reply:
        assert (reply.status, reply.read()) == (200, b"")


def test_an_upload_that_is_broken_off_is_no_fault_of_the_model(
    url: str, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    place = urlsplit(url)
    assert place.hostname is not None
    assert place.port is not None
    before = refused(runtime)
    with caplog.at_level(logging.ERROR), socket.create_connection((place.hostname, place.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 9999\r\n\r\n"
        connection.sendall(head.encode() + b"{" * 100)
        time.sleep(0.3)
    time.sleep(0.3)
    assert post(url, GOOD)[0] == 200
    assert not caplog.records
    assert refused(runtime) == before


def test_what_is_refused_for_others_sake_counts_as_busy(
    url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, invalid = refused(runtime)
    monkeypatch.setattr(guards, "SMALL_BYTES", 0)
    monkeypatch.setattr(guards, "MAX_BODIES_BYTES", 1_000)
    assert post(url, b" " * 2_000)[0] == 429
    assert refused(runtime) == (busy + 1, invalid)


def refused(runtime: Runtime) -> tuple[float, float]:
    """For being busy, and as invalid."""
    counts = runtime.metrics.refused
    return counts.labels("busy")._value.get(), counts.labels("invalid")._value.get()
