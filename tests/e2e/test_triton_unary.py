"""Clients without streams on a real tritonserver: unary gRPC, HTTP and /generate, with images as bytes or base64."""

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from stand_in import IMAGE, ask, decoding, png
from tritonclient.utils import InferenceServerException

from vismem.serving.client import Client
from vismem.serving.server import TritonServer

NAME = "vismem_unary"
BASE64 = base64.b64encode(IMAGE).decode()


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc_url) as connected:
        yield connected


def infer(client: triton.InferenceServerClient, *asked: Any, **more: Any) -> Any:
    return client.infer(NAME, inputs(*asked, **more), client_timeout=60)


def inputs(prompt: str = "hi", images: Any = (IMAGE,), limit: int = 3) -> list[triton.InferInput]:
    arrays = {
        "IMAGE": np.array(images, dtype=object),
        "PROMPT": np.array([prompt.encode()], dtype=object),
        "MAX_NEW_TOKENS": np.array([limit], np.int32),
    }
    kinds = {"MAX_NEW_TOKENS": "INT32"}
    tensors = [triton.InferInput(name, array.shape, kinds.get(name, "BYTES")) for name, array in arrays.items()]
    for tensor, array in zip(tensors, arrays.values(), strict=True):
        tensor.set_data_from_numpy(array)
    return tensors


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 20  # an endless answer takes 40
    while not found():
        assert time.monotonic() < end
        time.sleep(0.1)


def post(server: TritonServer, path: str, body: dict[str, Any], **headers: str) -> tuple[int, str]:
    asked = urllib.request.Request(f"{server.http_url}/v2/models/{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(asked, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_unary_client_gets_the_whole_answer_over_grpc(client: triton.InferenceServerClient) -> None:
    for image in (IMAGE, BASE64.encode()):
        answer = infer(client, images=[image])
        assert answer.as_numpy("TEXT").tolist() == [" é0 é1 é2".encode()]
        assert answer.as_numpy("USAGE").tolist() == [b""]  # the stand-in has none


def test_every_option_but_the_stream_reaches_the_runtime(client: triton.InferenceServerClient) -> None:
    answer = infer(client, "echo", [png(30, 20), png(8, 9)], 5)
    assert json.loads(answer.as_numpy("TEXT")[0]) == [[[30, 20], [8, 9]], 5, 0.0, 0, "learned", []]
    names = {tensor["name"] for tensor in client.get_model_metadata(NAME, as_json=True)["inputs"]}
    streamed = {tensor["name"] for tensor in client.get_model_metadata("vismem", as_json=True)["inputs"]}
    assert names == streamed - {"STREAM"}


def test_generate_takes_base64_and_gives_the_text(server: TritonServer) -> None:
    body = {"IMAGE": [BASE64], "PROMPT": "hi", "MAX_NEW_TOKENS": 3}
    status, reply = post(server, f"{NAME}/generate", body)
    assert (status, json.loads(reply)["TEXT"]) == (200, " é0 é1 é2")
    status, stream = post(server, "vismem/generate_stream", body)
    pieces = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line]
    assert (status, [piece["EVENT"] for piece in pieces]) == (200, ["token", "short", "token", "token", "end"])


def test_http_infer_takes_base64(server: TritonServer) -> None:
    inputs = [("IMAGE", BASE64), ("PROMPT", "hi")]
    body = {"inputs": [{"name": n, "datatype": "BYTES", "shape": [1], "data": [value]} for n, value in inputs]}
    status, reply = post(server, f"{NAME}/infer", body)
    outputs = {output["name"]: output["data"] for output in json.loads(reply)["outputs"]}
    assert (status, outputs["TEXT"][0][:10]) == (200, " é0 é1 é2 ")


def test_a_refusal_and_a_fault_come_as_errors(server: TritonServer, client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="IMAGE holds 0 images"):
        infer(client, images=())
    with pytest.raises(InferenceServerException, match="the model failed: RuntimeError: as asked"):
        infer(client, "fail")
    status, reply = post(server, f"{NAME}/generate", {"IMAGE": ["@@"], "PROMPT": "hi"})
    assert status == 400
    assert "does not decode" in reply
    assert infer(client).as_numpy("TEXT")[0].decode() == " é0 é1 é2"


@pytest.mark.parametrize("way", ["a cancelled call", "a deadline"])
def test_an_answer_ends_when_its_client_has_gone(
    server: TritonServer, client: triton.InferenceServerClient, way: str
) -> None:
    def left() -> int:
        return int(ask(server, "left")[0].text)

    before, files = left(), set(Path("/dev/shm").glob("vismem-*"))
    if way == "a cancelled call":
        call = client.async_infer(NAME, inputs("endless", limit=2000), callback=lambda *_: None)
        until(lambda: decoding(server))
        call.cancel()
    else:
        with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
            client.infer(NAME, inputs("endless", limit=2000), client_timeout=3)
    until(lambda: left() == before + 1)
    until(lambda: set(Path("/dev/shm").glob("vismem-*")) <= files)
    assert infer(client).as_numpy("TEXT")[0].decode() == " é0 é1 é2"


def test_many_at_once_are_answered_or_refused_as_busy(
    server: TritonServer, client: triton.InferenceServerClient
) -> None:
    def one(number: int) -> str:
        try:
            return str(infer(client, "hi", limit=1 + number % 4).as_numpy("TEXT")[0].decode())
        except InferenceServerException as error:
            return str(error.message())

    with ThreadPoolExecutor(80) as pool:
        found = list(pool.map(one, range(240)))
    expected = ["".join(f" é{i}" for i in range(1 + number % 4)) for number in range(240)]
    odd = {text for text, right in zip(found, expected, strict=True) if text != right}
    assert all("try again later" in text or "Exceeds maximum queue size" in text for text in odd)
    assert found[0] == expected[0]


def test_the_unary_model_is_no_model_to_choose(server: TritonServer) -> None:
    assert Client(f"grpc://{server.grpc_url}").find_model() == "vismem"
