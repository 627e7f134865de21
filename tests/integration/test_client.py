"""`vismem.Client` and `AsyncClient` over a real HTTP endpoint: answers, streams, deadlines, and what can go wrong."""

import asyncio
import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_stages
from http_calls import endless, ends, served
from PIL import Image

from examples import ask_http
from vismem import Answer, AsyncClient, Client
from vismem.errors import UserError
from vismem.generation.torch_executor import TorchExecutor
from vismem.inference import VisMem
from vismem.models.reference import Base
from vismem.runtime.chat import read_messages
from vismem.serving.answering import Runtime
from vismem.serving.exchange import BusyError, DeadlineError, DisconnectedError, RefusedError, ServerError
from vismem.serving.http import create_app

LIMIT = 12  # tokens
IMAGES, QUESTION = tiny.samples()[0].images, tiny.samples()[0].question


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMem:
    return VisMem(tiny_stages.eager_model(tiny_base), Base(str(tiny_base)), tiny_base)


@pytest.fixture(scope="module")
def runtime(model: VisMem) -> Runtime:
    return Runtime(TorchExecutor(model.model), rows=4)


@pytest.fixture(scope="module")
def url(runtime: Runtime) -> Iterator[str]:
    with served(create_app(runtime, "tiny", token="s3cret")) as address:
        yield address


@pytest.fixture
def client(url: str) -> Client:
    return Client(url, token="s3cret")


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def same(found: Answer, expected: Answer) -> None:
    assert (found, found.marked, found.invocations) == (expected, expected.marked, expected.invocations)
    assert (found.tokens, found.finished) == (expected.tokens, expected.finished)
    served = {name: found.usage[name] for name in ("prompt_tokens", "first_token_seconds")}
    assert served["first_token_seconds"] > 0
    assert found.usage == {**expected.usage, **served}


def test_an_answer_is_the_models_own_whole_streamed_and_with_every_option(client: Client, model: VisMem) -> None:
    expected = model.answer(IMAGES, QUESTION, max_new_tokens=LIMIT)
    assert expected.invocations
    same(client.ask(IMAGES, QUESTION, max_new_tokens=LIMIT), expected)
    pieces = list(client.stream(IMAGES, QUESTION, max_new_tokens=LIMIT))
    same(Answer.of(pieces, pieces[-1].usage or {}, 0), expected)
    assert len(pieces) > 5
    for memory, mode in (("off", False), ("short", "short"), ("long", "long")):
        options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0, "seed": 5}
        own = model.answer(IMAGES, QUESTION, memory=mode, **options)  # type: ignore[arg-type]
        same(client.ask(IMAGES, QUESTION, memory=memory, **options), own)
    cut = client.ask(IMAGES, QUESTION, max_new_tokens=LIMIT, stop=["no such text", expected[5:8]])
    assert cut == expected[: expected.index(expected[5:8])].strip()
    assert cut.finished


def test_images_may_be_paths_bytes_and_pillows(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    first = client.ask(IMAGES[0], QUESTION, max_new_tokens=LIMIT)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(io.BytesIO(IMAGES[0])), [IMAGES[0]]):
        same(client.ask(image, QUESTION, max_new_tokens=LIMIT), first)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cannot read the image none.png"):
        client.ask("none.png", QUESTION)


def test_a_conversation_is_asked_as_it_is(client: Client, model: VisMem) -> None:
    turns = read_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image"}]},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": QUESTION},
        ]
    )
    expected = model.answer(IMAGES[0], turns, max_new_tokens=LIMIT)
    assert expected != model.answer(IMAGES[0], QUESTION, max_new_tokens=LIMIT)
    same(client.ask(IMAGES[0], turns, max_new_tokens=LIMIT), expected)
    marks = f"before <image> and {QUESTION}"
    same(client.ask(IMAGES[0], marks, max_new_tokens=2), model.answer(IMAGES[0], marks, max_new_tokens=2))
    with pytest.raises(RefusedError, match="the turns have places for 1 images, and 2 were sent"):
        client.ask([IMAGES[0]] * 2, turns)


def test_async_answers_come_side_by_side_and_are_the_same(url: str, client: Client) -> None:
    async def ask() -> list[Answer]:
        several = AsyncClient(url, token="s3cret")
        pieces = [piece async for piece in several.stream(IMAGES, QUESTION, max_new_tokens=LIMIT)]
        asked = (several.ask(IMAGES, QUESTION, max_new_tokens=LIMIT) for _ in range(6))
        return [Answer.of(pieces, pieces[-1].usage or {}, 0), *await asyncio.gather(*asked)]

    expected = client.ask(IMAGES, QUESTION, max_new_tokens=LIMIT)
    for answer in asyncio.run(ask()):
        same(answer, expected)


def test_a_client_works_where_an_event_loop_runs_as_in_a_notebook(client: Client) -> None:
    async def cell() -> Answer:
        return client.ask(IMAGES, QUESTION, max_new_tokens=2)

    assert asyncio.run(cell()).tokens == 2


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_deadline_holds_on_a_server_that_hangs(scheme: str, silent: str) -> None:
    for model in (None, "vismem"):
        client = Client(f"{scheme}://{silent}", model=model, timeout=0.3)
        with pytest.raises(DeadlineError, match=r"no whole answer from .* in 0.3 s: it may be busy or dead"):
            client.ask(IMAGES, QUESTION)
        with pytest.raises(TimeoutError):
            next(client.stream(IMAGES, QUESTION))
    with pytest.raises(DeadlineError):
        client.find_model()


def test_a_deadline_is_that_of_the_whole_answer_and_ends_the_work(client: Client, runtime: Runtime) -> None:
    with endless(runtime):
        stream = client.stream(IMAGES, QUESTION, max_new_tokens=2048, timeout=1.5)
        with pytest.raises(DeadlineError):
            list(stream)
        ends(runtime)


def test_a_closed_stream_is_decoded_no_further(url: str, client: Client, runtime: Runtime) -> None:
    async def begin() -> None:
        stream = AsyncClient(url, token="s3cret").stream(IMAGES, QUESTION, max_new_tokens=2048)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    async def give_up() -> None:
        asking = asyncio.create_task(AsyncClient(url, token="s3cret").ask(IMAGES, QUESTION, max_new_tokens=2048))
        while not runtime.executor.sources:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
        asking.cancel()

    with endless(runtime):
        stream = client.stream(IMAGES, QUESTION, max_new_tokens=2048)
        next(stream)
        assert runtime.executor.sources  # type: ignore[attr-defined]
        stream.close()  # type: ignore[attr-defined]
        ends(runtime)
        for work in (begin, give_up):
            asyncio.run(work())
            ends(runtime)


def test_what_is_refused_says_why(url: str, client: Client) -> None:
    for options, reason in (
        ({"images": [b"no image"]}, "does not decode"),
        ({"images": []}, "the conversation holds 0 images"),
        ({"max_new_tokens": 0}, "max_completion_tokens: Input should be greater"),
        ({"memory": "both"}, "memory"),
        ({"question": " "}, "the conversation's text is empty"),
    ):
        with pytest.raises(RefusedError, match=reason):
            client.ask(**{"images": IMAGES, "question": QUESTION} | options)  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="there is no model 'other' here, but 'tiny'"):
        Client(url, token="s3cret", model="other").ask(IMAGES, QUESTION)
    with pytest.raises(RefusedError, match="no such token"):
        Client(url).ask(IMAGES, QUESTION)
    with pytest.raises(UserError, match="is no address of a server: give http://HOST:PORT or grpc://HOST:PORT"):
        Client("127.0.0.1:8080")


def test_a_busy_server_is_told_apart(model: VisMem, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Runtime(TorchExecutor(model.model), rows=1, waiting=1)
    held, join = threading.Event(), few.executor.join
    monkeypatch.setattr(few.executor, "join", lambda *given: (held.wait(20), join(*given))[1])
    with served(create_app(few, "tiny")) as address, ThreadPoolExecutor(2) as pool:
        client = Client(address)
        first = pool.submit(client.ask, IMAGES, QUESTION, max_new_tokens=2)
        while few.waiting or not few.thread:  # it is being read
            time.sleep(0.01)
        second = pool.submit(client.ask, IMAGES, QUESTION, max_new_tokens=2)
        while not few.waiting:
            time.sleep(0.01)
        with pytest.raises(BusyError, match="questions are waiting: ask again later"):
            client.ask(IMAGES, QUESTION)
        held.set()
        assert first.result() == second.result()


def test_a_server_that_stops_within_an_answer_is_busy(model: VisMem, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(tokens: object) -> None:
        raise SystemExit

    stopping = Runtime(TorchExecutor(model.model))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(stopping.executor, "append", stop)  # behind the first token
    with (
        served(create_app(stopping, "tiny")) as address,
        pytest.raises(BusyError, match="v1: the server stops: ask again later"),
    ):
        Client(address).ask(IMAGES, QUESTION)


def test_a_fault_of_the_model_is_no_refusal(client: Client, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runtime.executor, "append", lambda tokens: 1 / 0)
        with pytest.raises(ServerError, match="the model failed") as caught:
            client.ask(IMAGES, QUESTION)
        assert type(caught.value) is ServerError
    assert client.ask(IMAGES, QUESTION, max_new_tokens=2).tokens == 2


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_where_no_server_listens_it_is_said(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(
        DisconnectedError, match=r"no (model )?server answers at .*: start one with `vismem (api|serve)`"
    ):
        Client(f"{scheme}://127.0.0.1:{port}").ask(IMAGES, QUESTION)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
BEGUN = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    "reply",
    [b"", HEAD, HEAD + b"Content-Length: 999\r\n\r\n" + BEGUN, HEAD + b"Connection: close\r\n\r\n" + BEGUN, b"\0\1\2"],
    ids=["nothing", "half a head", "less than was said", "no end", "no HTTP"],
)
def test_a_connection_that_breaks_is_no_whole_answer(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(100_000)
                connection.sendall(reply)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(100_000):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DisconnectedError, match=r"broke|ended the answer half-way"):
            Client(f"http://127.0.0.1:{listening.getsockname()[1]}", model="tiny").ask(IMAGES, QUESTION)
        thread.join()


def test_the_example_with_the_openai_package_prints_the_answer(
    model: VisMem, runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    expected = model.answer(IMAGES[0], QUESTION).marked
    assert "⟨" in expected
    with served(create_app(runtime, "tiny")) as address:
        ask_http.main(f"{tmp_path}/a.png", QUESTION, f"{address}/v1")
    assert capsys.readouterr().out.strip() == expected


def test_a_client_needs_no_torch() -> None:
    code = "import sys; from vismem import AsyncClient, Answer, Client; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
