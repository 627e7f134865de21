"""The connection that a client's answers share: one for an event loop, and another after it broke."""

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

import grpc
import pytest

from vismem import AsyncClient, Client
from vismem.serving.connection import Connection
from vismem.serving.exchange import (
    BusyError,
    DeadlineError,
    DisconnectedError,
    Question,
    RefusedError,
    ServerError,
    Token,
)
from vismem.serving.over_grpc import OverGrpc, _request


def test_a_loop_has_one_connection_until_it_is_dropped() -> None:
    connection = Connection(object)

    async def several() -> list[object]:
        found = [connection.get(), connection.get()]
        connection.drop()
        return [*found, connection.get()]

    first, again, other = asyncio.run(several())
    assert first is again
    assert other is not first
    assert asyncio.run(several())[0] not in (first, other)


def test_a_client_asks_a_server_that_was_restarted() -> None:
    def start(port: int) -> tuple[grpc.Server, int]:
        server = grpc.server(ThreadPoolExecutor(1))  # without services: it answers, if only that
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        return server, port

    server, port = start(0)
    client = Client(f"grpc://127.0.0.1:{port}", timeout=20)
    for _ in range(3):
        with pytest.raises(ServerError, match="Method not found") as caught:
            client.find_model()
        assert type(caught.value) is ServerError
        server.stop(0).wait()
        with pytest.raises(DisconnectedError):
            client.find_model()
        server, _ = start(port)
    server.stop(0)


def test_one_client_serves_several_event_loops() -> None:
    client = AsyncClient("grpc://127.0.0.1:1")
    for _ in range(2):
        with pytest.raises(DisconnectedError):
            asyncio.run(client.find_model())


def test_a_server_that_is_not_there_is_named_whole_and_streamed() -> None:
    client = Client("grpc://127.0.0.1:1", model="vismem")
    for ask in (client.ask, lambda *asked: list(client.stream(*asked))):
        with pytest.raises(DisconnectedError, match=r"no model server answers at 127.0.0.1:1: start one with"):
            ask(b"", "?")
    with pytest.raises(DisconnectedError, match=r"no model server answers at nowhere.invalid:1"):
        Client("grpc://nowhere.invalid:1", model="vismem").ask(b"", "?")


def test_a_name_that_was_found_is_found_again_where_it_is_served_no_more() -> None:
    names = ["vismem_challenger"]

    class Server:
        async def models(self) -> list[str]:
            return names

        async def pieces(self, model: str, *_: object) -> AsyncGenerator[Token, None]:
            if model not in names:
                raise RefusedError("not ready")
            yield Token(model, "token")
            yield Token("", "end", {})

    def asked(client: AsyncClient) -> str:
        return str(asyncio.run(client.ask(b"", "?")))

    found, given = (AsyncClient("grpc://127.0.0.1:1", model=name) for name in (None, "vismem_challenger"))
    found.server = given.server = Server()  # type: ignore[assignment]
    assert asked(found) == asked(given) == "vismem_challenger"
    names[:] = ["vismem"]
    for client in (found, given, given):
        with pytest.raises(RefusedError):
            asked(client)
    assert asked(found) == "vismem"


def test_a_deadline_need_not_be_finite() -> None:
    question = Question((b"png",), "?")
    found = [_request("vismem", question, False, timeout)["timeout"] for timeout in (math.inf, 2.5, 0)]
    assert found == [10**15, 2_500_000, 1]


def in_time(ask: Callable[[], object]) -> object:
    """What a call in another thread comes to: one that hangs fails the test."""
    found = list[object]()

    def run() -> None:
        try:
            found.append(ask())
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            found.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    return found[0] if found else "it hangs"


UNSENDABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "half a character": ("\ud800", {}, "surrogates not allowed"),
    "half a character in a stop text": ("?", {"stop": "\ud800"}, "surrogates not allowed"),
    "tokens": ("?", {"max_new_tokens": 2**31}, "2147483648"),
    "a seed": ("?", {"seed": 2**63}, "too large"),
    "no number": ("?", {"temperature": "hot"}, "'hot'"),
    "infinity": ("?", {"temperature": math.inf}, "Out of range"),
}


@pytest.mark.parametrize("way", ["grpc://127.0.0.1:1", "http://127.0.0.1:1"])
@pytest.mark.parametrize("kind", UNSENDABLE)
def test_what_cannot_be_sent_is_refused(kind: str, way: str) -> None:
    question, options, said = UNSENDABLE[kind]
    client, several = Client(way, model="m"), AsyncClient(way, model="m")
    for ask in (
        lambda: client.ask(b"", question, **options),
        lambda: list(client.stream(b"", question, **options)),
        lambda: asyncio.run(several.ask(b"", question, **options)),
    ):
        error = in_time(ask)
        if ("half" in kind) or (kind == "infinity") == way.startswith("http"):
            assert type(error) is RefusedError
            assert re.search(f"the question cannot be sent: .*{said}", str(error))
        else:  # the other protocol can say it: the server, if there were one, refuses it
            assert type(error) is DisconnectedError


class Call:
    """Triton's client and its stream, which gRPC cancels at once, or never answers."""

    def __init__(self, ends: bool) -> None:
        self.ends = ends

    async def is_model_ready(self, model: str) -> bool:
        if self.ends:
            raise asyncio.CancelledError
        return await asyncio.Future()

    def stream_infer(self, *_: object, **__: object) -> "Call":
        return self

    async def __aiter__(self) -> AsyncGenerator[Any, None]:
        yield await self.is_model_ready("m")

    def cancel(self) -> None: ...


def test_what_grpc_cancels_is_broken_off_however_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OverGrpc, "_connect", lambda _: Call(ends=True))
    client, several = Client("grpc://127.0.0.1:1", model="m"), AsyncClient("grpc://127.0.0.1:1", model="m")

    async def streamed() -> list[Token]:
        return [piece async for piece in several.stream(b"", "?")]

    for ask in (
        lambda: client.ask(b"", "?"),
        lambda: list(client.stream(b"", "?")),
        lambda: client.find_model("m"),
        lambda: asyncio.run(several.ask(b"", "?")),
        lambda: asyncio.run(streamed()),
    ):
        error = in_time(ask)
        assert "the answer from 127.0.0.1:1 was broken off" in str(error)
        assert isinstance(error, DisconnectedError)


def test_what_the_caller_cancels_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OverGrpc, "_connect", lambda _: Call(ends=False))
    client = AsyncClient("grpc://127.0.0.1:1", model="m")

    async def given_up() -> None:
        asking = asyncio.create_task(client.ask(b"", "?"))
        await asyncio.sleep(0.1)
        asking.cancel()
        await asking

    assert isinstance(in_time(lambda: asyncio.run(given_up())), asyncio.CancelledError)
    assert isinstance(in_time(lambda: asyncio.run(client.ask(b"", "?", timeout=0.1))), DeadlineError)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("the server stops: ask again later", BusyError),
        ("Exceeds maximum queue size", BusyError),
        ("the model failed: RuntimeError: out of memory", ServerError),
        ("SEED is -1: it must not be negative", RefusedError),
    ],
)
def test_what_triton_says_is_told_apart(message: str, kind: type[ServerError]) -> None:
    assert type(OverGrpc("here:1", "", tls=False)._fault("vismem", message)) is kind


def test_after_a_server_that_stops_its_name_is_looked_up_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OverGrpc, "_connect", lambda _: object())
    server = OverGrpc("here:1", "", tls=False)

    async def connection_after(message: str) -> tuple[object, object]:
        before = server.connection.get()
        server._fault("vismem", message)
        return before, server.connection.get()

    before, after = asyncio.run(connection_after("Exceeds maximum queue size"))
    assert after is before
    before, after = asyncio.run(connection_after("the server stops: ask again later"))
    assert after is not before
