"""Wrong requests over HTTP: each gets its reason, and nobody else notices."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from http_calls import GOOD, messages, post, url_of
from malformed import MALFORMED, Malformed

PICTURE = GOOD["messages"][0]["content"][0]
NAMES = {"max_new_tokens": "max_completion_tokens"}
SAID = {  # of what Triton's clients are told
    "IMAGE": "the conversation",
    "PROMPT": "the conversation's text",
    "STOP holds 5 texts": "stop: List should have at most 4 items",
    "STOP": "stop",
    "MAX_NEW_TOKENS is": "max_completion_tokens: Input should be|",
}


def saying(*parts: Any, role: str = "user") -> dict[str, Any]:
    return GOOD | {"messages": [{"role": role, "content": list(parts)}]}


def shown(address: str) -> dict[str, Any]:
    return saying({"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "what?"})


def with_images(messages: Any, images: Iterator[str]) -> Any:
    """The messages with each `{"type": "image"}` as OpenAI writes it."""
    if isinstance(messages, list):
        return [with_images(item, images) for item in messages]
    if messages == {"type": "image"}:
        return {"type": "image_url", "image_url": {"url": next(images)}}
    return (
        {key: with_images(value, images) for key, value in messages.items()} if isinstance(messages, dict) else messages
    )


def body_of(request: Malformed) -> dict[str, Any]:
    turns = messages(request.images, request.prompt)
    if request.messages is not None:
        turns = with_images(request.messages, map(url_of, request.images))
    options = {NAMES.get(name, name): value for name, value in request.options.items()}
    memory = {"vismem": {"memory": options.pop("memory")}} if "memory" in options else {}
    return {"model": "tiny", "messages": turns, "max_completion_tokens": 2, **options, **memory}


@pytest.mark.parametrize("kind", [kind for kind in MALFORMED if kind != "a negative seed"])  # OpenAI has those
def test_what_no_protocol_can_answer_gets_its_reason_and_the_next_one_its_answer(url: str, kind: str) -> None:
    request = MALFORMED[kind]
    status, reply = post(url, body_of(request))
    assert (status, reply["error"]["type"]) == (400, "invalid_request_error"), reply
    reason = request.reason
    for name, said in SAID.items():
        reason = reason.replace(name, said)
    assert re.search(reason, reply["error"]["message"]), reply
    assert post(url, GOOD)[0] == 200


DEEP = 200_000
WRONG: dict[str, tuple[int, Any, str]] = {
    "no JSON": (400, b"{", "Invalid JSON"),
    "no body": (400, b"", "Invalid JSON"),
    "bytes that are no text": (400, b"\xff\xfe", "Invalid JSON"),
    "JSON without end": (400, b"[" * DEEP, "Invalid JSON"),
    "deep JSON": (400, b"[" * DEEP + b"]" * DEEP, "Invalid JSON"),
    "a list": (400, b"[]", "the body: "),
    "nothing": (400, {}, "model: Field required"),
    "another model": (404, GOOD | {"model": "gpt"}, "there is no model 'gpt' here, but 'tiny'"),
    "257 turns": (400, GOOD | {"messages": [{"role": "user", "content": "a"}] * 257}, "messages: "),
    "257 parts": (400, saying(PICTURE, *[{"type": "text", "text": "a"}] * 256), "messages.0.content: "),
    "an image of the text's type": (400, saying(PICTURE, {"type": "image"}), "messages.0.content.1: "),
    "a text of no Unicode": (400, saying(PICTURE, {"type": "text", "text": "\ud800"}), ""),
    "tools": (400, GOOD | {"tools": [{"type": "function"}]}, "tools: List should have at most 0 items"),
    "a format": (400, GOOD | {"response_format": {"type": "json_object"}}, "response_format.type: Input should be"),
    "two answers": (400, GOOD | {"n": 2}, "n: Input should be 1"),
    "nucleus sampling": (400, GOOD | {"top_p": 0.5}, "top_p: Input should be 1"),
    "a warm temperature": (400, GOOD | {"temperature": "warm"}, "temperature: "),
    "a seed of 64 bits": (400, GOOD | {"seed": 2**63}, "seed: "),
    "half a token": (400, GOOD | {"max_tokens": 1.5}, "max_tokens: "),
    "a stream of text": (400, GOOD | {"stream": "of text"}, "stream: "),
    "a memory that is a list": (400, GOOD | {"vismem": {"memory": ["short"]}}, "vismem.memory: "),
    "an unknown extension": (400, GOOD | {"vismem": {"memories": 3}}, "vismem.memories: "),
    "an address": (400, shown("http://127.0.0.1/1.png"), "an image must be a data URL"),
    "a file": (400, shown("file:///etc/passwd"), "an image must be a data URL"),
    "no address": (400, shown(""), "an image must be a data URL"),
    "a data URL of a text": (400, shown("data:text/plain;base64,aGk="), "an image must be a data URL"),
    "a data URL without base64": (400, shown("data:image/png,abc"), "an image must be a data URL"),
    "broken base64": (400, shown("data:image/png;base64,@@@"), "an image's base64 does not decode"),
    "base64 cut short": (400, shown("data:image/png;base64,aGk"), "an image's base64 does not decode"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_over_http_gets_its_reason_and_the_next_one_its_answer(url: str, kind: str) -> None:
    status, body, reason = WRONG[kind]
    found, reply = post(url, body)
    assert (found, reply["error"]["type"]) == (status, "invalid_request_error")
    assert reason in reply["error"]["message"]
    assert post(url, GOOD)[0] == 200
