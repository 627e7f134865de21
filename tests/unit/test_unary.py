"""NAME_unary without Triton: what it refuses is not copied, and no request is left without a response."""

import importlib.util
import json
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_access import REFUSED, TAKEN

from vismem.runtime.access import NO_TOKEN, TOKEN_VARIABLE
from vismem.serving.repository import UNARY_SOURCE


class Request:
    """One of 20 bytes, whose response is kept."""

    def __init__(self, authorization: str = "") -> None:
        self.header, self.read, self.said = authorization, 0, list[str]()

    def parameters(self) -> str:
        return json.dumps({"Authorization": self.header} if self.header else {})

    def inputs(self) -> list[Any]:
        self.read += 1
        return [SimpleNamespace(name=lambda: "IMAGE", as_numpy=lambda: np.array([bytes(12), bytes(8)], object))]

    def get_response_sender(self) -> Any:
        return SimpleNamespace(is_cancelled=lambda: False, send=lambda response, flags: self.said.append(response))


@pytest.fixture
def unary(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    class Error(str):
        INVALID_ARG = UNAVAILABLE = None

        def __new__(cls, said: str, code: None = None) -> "Error":
            return str.__new__(cls, said)

    triton: Any = ModuleType("triton_python_backend_utils")
    triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL, triton.TritonError = 1, Error
    triton.Logger = SimpleNamespace(log_info=lambda said: None)
    triton.InferenceResponse, triton.Tensor = lambda error: error, lambda name, array: (name, array)
    monkeypatch.setitem(sys.modules, triton.__name__, triton)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    spec = importlib.util.spec_from_file_location("unary", UNARY_SOURCE)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(module.TritonPythonModel, "_asked", lambda *_: "answer")
    return module


def said(unary: ModuleType, *requests: Request) -> list[list[str]]:
    model = unary.TritonPythonModel()
    model.initialize({"model_repository": "/none", "model_version": "1", "model_name": "vismem_unary"})
    model.execute(list(requests))
    model.finalize()
    assert model.free._value == unary.MOST, "a place is never lost"
    return [request.said for request in requests]


def test_without_the_token_a_request_is_not_even_copied(unary: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
    refused, taken = [Request(sent) for sent in REFUSED], [Request(sent) for sent in TAKEN]
    assert said(unary, *refused, *taken) == [[NO_TOKEN]] * len(refused) + [["answer"]] * len(taken)
    assert [request.read for request in (*refused, *taken)] == [0] * len(refused) + [1] * len(taken)


def slow(*_: object) -> str:
    time.sleep(0.2)
    return "answer"


def test_requests_beyond_those_that_run_are_not_copied_and_large_ones_not_held(
    unary: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(unary, "MOST_BYTES", 20)
    assert said(unary, Request()) == [["answer"]]
    monkeypatch.setattr(unary, "MOST_BYTES", 19)
    assert said(unary, Request()) == [["the request holds more than 19 bytes"]]
    monkeypatch.setattr(unary, "MOST_BYTES", 20)
    monkeypatch.setattr(unary, "MOST", 1)
    monkeypatch.setattr(unary.TritonPythonModel, "_asked", slow)
    requests = [Request(), Request()]
    assert said(unary, *requests) == [["answer"], ["1 requests are running: try again later"]]
    assert [request.read for request in requests] == [1, 0]


def test_a_request_that_cannot_be_read_is_answered_and_the_next_one_too(
    unary: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    damaged = Request()
    monkeypatch.setattr(damaged, "inputs", lambda: [SimpleNamespace(name=lambda: "IMAGE", as_numpy=lambda: 1 / 0)])
    assert said(unary, damaged, Request()) == [["division by zero"], ["answer"]]
