"""Wrong requests over gRPC, to a real bundle: each gets its reason, and the next one its answer."""

import json
import queue
import re
from itertools import chain
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from malformed import MALFORMED, PNG, QUESTION, Malformed

from vismem.serving.server import TritonServer

MODEL = "vismem_challenger"
TYPES = {"MAX_NEW_TOKENS": "INT32", "TEMPERATURE": "FP32", "SEED": "INT64", "STREAM": "BOOL"}
ARRAYS = {"INT32": np.int32, "FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_, "BYTES": np.object_}
GOOD: dict[str, Any] = {"IMAGE": [PNG], "PROMPT": [QUESTION.encode()], "MAX_NEW_TOKENS": [2]}


def ask(server: TritonServer, inputs: dict[str, Any], parameters: Any = None, **types: str) -> str:
    """The reason of the refusal; "" for an answer. `types` of inputs, where they are not as they should be."""
    return responses(server, inputs, parameters, **types)[1]


def responses(server: TritonServer, inputs: dict[str, Any], parameters: Any, **types: str) -> tuple[list[Any], str]:
    """The events of each response, and the reason of the refusal."""
    events: list[Any] = []
    replies: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    tensors = []
    for name, values in inputs.items():
        kind = types.get(name, TYPES.get(name, "BYTES"))
        array = np.array(values, dtype=ARRAYS[kind])
        tensors.append(triton.InferInput(name, array.shape, kind).set_data_from_numpy(array))
    with triton.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(callback=lambda result, error: replies.put((result, error)))
        client.async_stream_infer(MODEL, tensors, enable_empty_final_response=True, parameters=parameters)
        result, error = replies.get(timeout=60)
        while error is None and not result.get_response().parameters["triton_final_response"].bool_param:
            events.append(result.as_numpy("EVENT").tolist())
            result, error = replies.get(timeout=60)
    return events, "" if error is None else str(error.message())


def inputs_of(request: Malformed) -> dict[str, Any]:
    inputs: dict[str, Any] = {**GOOD, "IMAGE": list(request.images), "PROMPT": [request.prompt.encode()]}
    if request.messages is not None:
        inputs = {**inputs, "MESSAGES": [json.dumps(request.messages).encode()]}
        del inputs["PROMPT"]
    for name, value in request.options.items():
        several = value if isinstance(value, list) else [value]
        inputs[name.upper()] = [item.encode() if isinstance(item, str) else item for item in several]
    return inputs


@pytest.mark.parametrize("kind", [kind for kind in MALFORMED if kind != "a file in base64"])  # Triton takes it
def test_what_no_protocol_can_answer_gets_its_reason_and_the_next_one_its_answer(
    bundle_server: TritonServer, kind: str
) -> None:
    request = MALFORMED[kind]
    found = ask(bundle_server, inputs_of(request))
    assert re.search(request.reason, found), found
    assert ask(bundle_server, GOOD) == ""


@pytest.mark.parametrize("value", [-1, "soon", True])
def test_an_interval_that_is_none_is_refused(bundle_server: TritonServer, value: Any) -> None:
    assert f"the parameter interval_ms is {value!r}: it must be" in ask(bundle_server, GOOD, {"interval_ms": value})


def test_what_is_decoded_in_an_interval_comes_together(bundle_server: TritonServer) -> None:
    asked = GOOD | {"MAX_NEW_TOKENS": [40], "TEMPERATURE": [1.0]}
    alone, _ = responses(bundle_server, asked, {})
    together, _ = responses(bundle_server, asked, {"interval_ms": 1_000_000})
    assert list(chain(*together)) == list(chain(*alone))
    assert {len(events) for events in alone} == {1}
    assert len(together) <= 2  # the first at once, the others at the end


def messages(*parts: Any) -> list[bytes]:
    return [json.dumps([{"role": "user", "content": list(parts)}]).encode()]


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": QUESTION}
WITHOUT = {"IMAGE": [PNG], "MAX_NEW_TOKENS": [2]}
WRONG: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "no input": ({}, {}, "expected|got 0"),
    "no image": ({"PROMPT": GOOD["PROMPT"]}, {}, "expected|IMAGE"),
    "no prompt": (WITHOUT, {}, "PROMPT is empty"),
    "both prompts": (GOOD | {"MESSAGES": messages(IMAGE, TEXT)}, {}, "PROMPT and MESSAGES are both there"),
    "an unknown input": (GOOD | {"TOP_P": [b"1"]}, {}, "TOP_P"),
    "two prompts": (GOOD | {"PROMPT": [b"a", b"b"]}, {}, "PROMPT"),
    "no value": (GOOD | {"PROMPT": []}, {}, "PROMPT"),
    "a table of images": (GOOD | {"IMAGE": [[PNG, PNG]]}, {}, "IMAGE"),
    "a prompt that is a number": (GOOD | {"PROMPT": [5]}, {"PROMPT": "INT32"}, "PROMPT"),
    "tokens of 64 bits": (GOOD, {"MAX_NEW_TOKENS": "INT64"}, "MAX_NEW_TOKENS"),
    "a temperature of text": (GOOD | {"TEMPERATURE": [b"warm"]}, {"TEMPERATURE": "BYTES"}, "TEMPERATURE"),
    "a prompt that is no UTF-8": (GOOD | {"PROMPT": [b"\xff\xfe"]}, {}, "PROMPT is not UTF-8"),
    "a memory that is no UTF-8": (GOOD | {"MEMORY": [b"\xff"]}, {}, "MEMORY is not UTF-8"),
    "a stop that is no UTF-8": (GOOD | {"STOP": [b"\xff"]}, {}, "STOP is not UTF-8"),
    "messages that are no JSON": (WITHOUT | {"MESSAGES": [b"{"]}, {}, "MESSAGES: it is not JSON"),
    "messages that are no UTF-8": (WITHOUT | {"MESSAGES": [b"\xff"]}, {}, "MESSAGES: it is not JSON"),
    "deep messages": (WITHOUT | {"MESSAGES": [b"[" * 100_000]}, {}, "MESSAGES: it is not JSON"),
    "long messages": (WITHOUT | {"MESSAGES": [b" " * 400_000]}, {}, "MESSAGES holds 400000 bytes"),
    "half of a character": (
        WITHOUT | {"MESSAGES": messages(IMAGE, {"type": "text", "text": "\ud800"})},
        {},
        "not UTF-8",
    ),
    "not a number among messages": (WITHOUT | {"MESSAGES": [b"[NaN]"]}, {}, "MESSAGES: messages must be"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_over_grpc_gets_its_reason_and_the_next_one_its_answer(
    bundle_server: TritonServer, kind: str
) -> None:
    inputs, types, reason = WRONG[kind]
    found = ask(bundle_server, inputs, **types)
    assert re.search(reason, found), found
    assert ask(bundle_server, GOOD) == ""
