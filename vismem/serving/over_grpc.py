"""The client's side of Triton's gRPC protocol (deploy/triton/README.md)."""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from vismem.runtime.access import NO_TOKEN
from vismem.runtime.chat import Chat, messages_of
from vismem.serving.connection import Connection
from vismem.serving.exchange import (
    BusyError,
    DisconnectedError,
    Question,
    RefusedError,
    ServerError,
    Token,
    UnauthorizedError,
    sendable,
)
from vismem.serving.pieces import STOPPED, TOGETHER
from vismem.serving.repository import is_unary

BUSY = {  # part of a server's message: what it means for the caller, where it does not say so itself
    "Exceeds maximum queue size": "it is busy, its queue is full: try again later",
    "Request timeout expired": "it is busy, the request waited too long: try again later",
    "all workers were busy": "it is busy, the request waited too long: try again later",
    "ask again later": "",
}
FAILED = {  # the same; other messages say what is wrong with the request
    "is not healthy": "its process is not healthy: restart `vismem serve`",
    "the model failed": "",
}
UNKNOWN = {"Request for unknown model": "it is not ready on this server: see the log of `vismem serve`"}
UNREACHED = ("Failed to connect", "errors resolving")  # what a stream says of a server that was never there
LONGEST = 1e9  # seconds that a request can say
OPTIONS = [  # of a connection; where the name has several addresses, as a cluster's service, all are asked in turn
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.use_local_subchannel_pool", 1),  # a new connection after one that broke is really new
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class OverGrpc:
    """The Triton server at `url` ("host:port"), over TLS with the certificates that Python trusts (SSL_CERT_FILE)."""

    def __init__(self, url: str, token: str, tls: bool) -> None:
        self.url, self.tls = url, tls
        self.headers = {"authorization": f"Bearer {token}"} if token else {}
        self.connection: Connection[Any] = Connection(self._connect)

    async def models(self) -> list[str]:
        """The names of the models that it counts requests of: its list of models is closed to clients."""
        async with self._client() as client:
            statistics = await client.get_inference_statistics()
        return sorted({model.name for model in statistics.model_stats if not is_unary(model.name)})

    async def ready(self, model: str) -> bool:
        """Whether it serves the model."""
        async with self._client() as client:
            return bool(await client.is_model_ready(model))

    async def pieces(self, model: str, question: Question, stream: bool, timeout: float) -> AsyncGenerator[Token, None]:
        """The answer piece by piece, in one response unless `stream`; closing it cancels the work on the server.

        `timeout`: seconds that it may wait in the server's queue. What has ended is read until the server closes the
        stream: Triton 2.51 may die, or never unload the model, where a stream is cancelled as its last response goes.
        """
        with sendable():  # not as the stream asks for it: what fails there cancels the stream, and says nothing
            request = _request(model, question, stream, timeout)
        async with self._client() as client:
            answered, fault = False, None
            call = client.stream_infer(_one(request), headers=self.headers)
            try:
                async for result, error in call:
                    if error is not None:
                        answered, fault = True, self._fault(model, error.message())
                        continue
                    outputs = [result.as_numpy(name) for name in ("TEXT", "EVENT", "USAGE")]
                    if outputs[0] is not None:
                        for text, event, usage in zip(*outputs, strict=True):
                            answered = answered or event == b"end"
                            yield Token(text.decode(), event.decode(), json.loads(usage) if usage else None)
                answered = True
            finally:
                if not answered:
                    call.cancel()
            if fault:
                raise fault

    def _fault(self, model: str, message: str) -> ServerError:
        """By the message: a stream's errors have no status, and Triton 2.51 dies of the mode in which they have one.

        A server that stops keeps its connections, and new addresses are looked up for a new one alone.
        """
        if STOPPED in message:
            self.connection.drop()
        kinds = ((BusyError, BUSY), (ServerError, FAILED), (RefusedError, UNKNOWN), (UnauthorizedError, {NO_TOKEN: ""}))
        for kind, reasons in kinds:
            if mark := next((mark for mark in reasons if mark in message), None):
                return kind(f"model '{model}' at {self.url}: {reasons[mark] or message}")
        return RefusedError(f"model '{model}' at {self.url}: {message}")

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        """The connection, and what goes wrong with it as a ServerError."""
        import grpc
        from tritonclient.utils import InferenceServerException

        try:
            yield self.connection.get()
        except InferenceServerException as error:
            if "UNAVAILABLE" not in str(error.status()):
                raise ServerError(f"the server at {self.url}: {error.message()}") from None
            self.connection.drop()
            raise self._nobody(error.message()) from None
        except grpc.RpcError as error:  # of a stream
            self.connection.drop()
            if any(mark in error.details() for mark in UNREACHED):
                raise self._nobody(error.details()) from None
            raise DisconnectedError(f"the connection to {self.url} broke: {error.details()}") from None
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            self.connection.drop()  # nobody cancels this task: gRPC broke its call off
            raise DisconnectedError(f"the answer from {self.url} was broken off") from None

    def _nobody(self, why: str) -> DisconnectedError:
        hint = "start one with `vismem serve` in another terminal, or name another with --url"
        if self.tls:
            hint = f"it has no TLS, or a certificate that SSL_CERT_FILE does not name, or nobody listens ({why})"
        return DisconnectedError(f"no model server answers at {self.url}: {hint}")

    def _connect(self) -> Any:
        import tritonclient.grpc.aio as triton

        trusted = ssl.get_default_verify_paths().cafile  # without: those that gRPC brings
        return triton.InferenceServerClient(self.url, ssl=self.tls, root_certificates=trusted, channel_args=OPTIONS)


def _asked(asked: str | Chat) -> dict[str, np.ndarray[Any, Any]]:
    name, text = ("PROMPT", asked) if isinstance(asked, str) else ("MESSAGES", json.dumps(messages_of(asked)))
    return {name: np.array([text.encode()], dtype=object)}


async def _one(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request


def _request(model: str, question: Question, stream: bool, timeout: float) -> dict[str, Any]:
    """As Triton's client takes it. ValueError or OverflowError for what gRPC cannot say."""
    from tritonclient.grpc import InferInput
    from tritonclient.utils import np_to_triton_dtype

    longest = question.max_new_tokens
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "IMAGE": np.array(question.images, dtype=object),
        **_asked(question.asked),
        **({"MAX_NEW_TOKENS": np.array([longest], dtype=np.int32)} if longest is not None else {}),
        "TEMPERATURE": np.array([question.temperature], dtype=np.float32),
        "SEED": np.array([question.seed], dtype=np.int64),
        "MEMORY": np.array([question.memory.encode()], dtype=object),
        "STREAM": np.array([stream]),
        **({"STOP": np.array([text.encode() for text in question.stop], dtype=object)} if question.stop else {}),
    }
    inputs = [
        InferInput(name, value.shape, np_to_triton_dtype(value.dtype)).set_data_from_numpy(value)
        for name, value in arrays.items()
    ]
    parameters = {"interval_ms": round(1000 * TOGETHER)} if stream else {}
    microseconds = max(1, int(min(timeout, LONGEST) * 1e6))
    model.encode()
    return {"model_name": model, "inputs": inputs, "timeout": microseconds, "parameters": parameters}
