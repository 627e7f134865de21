"""Requests that are made to hold an HTTP server up: many fields, slow bodies, readers that do not read, other sites."""

import asyncio
import gc
import io
import json
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_stages
from http_calls import GOOD, post
from PIL import Image

from vismem.generation.torch_executor import TorchExecutor
from vismem.runtime.images import let_go
from vismem.runtime.limits import Room
from vismem.serving import guards
from vismem.serving.answering import Runtime
from vismem.serving.completion import Completion
from vismem.serving.guards import Connection, Patience


def opened(kind: str = "PNG") -> Image.Image:
    file = io.BytesIO()
    Image.new("RGBA", (84, 84), "red").save(file, kind)
    return Image.open(file)


@pytest.fixture(scope="module")
def runtime(tiny_base: Path) -> Runtime:
    return Runtime(TorchExecutor(tiny_stages.eager_model(tiny_base)), rows=1, waiting=0)


@pytest.mark.parametrize("body", [b'{"a":1' + b',"a":1' * 200_000 + b"}", b'{"messages":[' + b"1," * 400_000 + b"1]}"])
def test_a_body_of_very_many_fields_is_not_read(url: str, body: bytes) -> None:
    status, reply = post(url, body)
    assert (status, reply["error"]["message"]) == (413, "the request has too many fields")


def test_bodies_that_do_not_come_or_are_too_large_together_are_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9000\r\n\r\n".encode()
    monkeypatch.setattr(guards, "PAUSE_SECONDS", 2.0)
    monkeypatch.setattr(guards, "MAX_BODIES_BYTES", 10_000)
    monkeypatch.setattr(guards, "SMALL_BYTES", 5_000)
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(head + b" " * 8_000)
        time.sleep(0.5)
        assert post(url, b" " * 8_000)[0] == 429
        assert post(url, b" " * 4_000)[0] == 400, "it is no JSON, and small ones are read nevertheless"
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    assert post(url, GOOD)[0] == 200


def test_a_body_may_pause_but_not_trickle(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host, port = url.removeprefix("http://").split(":")
    monkeypatch.setattr(guards, "PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(guards, "BODY_RATE", 100)

    def ended(*, parts: int, size: int) -> bytes:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {parts * size}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode())
            for _ in range(parts):
                connection.sendall(b" " * size)
                if select.select([connection], [], [], 0.2)[0]:
                    break
            return connection.recv(1000)[:12]

    assert ended(parts=10, size=10) == b"HTTP/1.1 408", "50 bytes a second"
    assert ended(parts=10, size=100) == b"HTTP/1.1 400", "it came, and is no JSON"


def test_more_requests_at_a_time_than_are_read_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "MAX_BODIES", 0)
    assert post(url, GOOD)[0] == 429


def connections(url: str, count: int) -> list[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    return [socket.create_connection((host, int(port)), timeout=20) for _ in range(count)]


HEAD = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize("before", [b"", HEAD, HEAD.replace(b"Host", b"Content-Length: 99\r\nHost")])
@pytest.mark.parametrize("sent", [b"", b"GET /v1/models HTTP/1.1\r\nHos"])
def test_a_connection_on_which_no_request_begins_ends(
    url: str, before: bytes, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one, one that was answered, and one that was answered before its body was there."""
    monkeypatch.setattr(guards, "HEAD_SECONDS", 0.5)
    (waits,) = connections(url, 1)
    with waits:
        if before:
            waits.sendall(before)
            assert waits.recv(10_000).startswith(b"HTTP/1.1 200")
        if sent:
            waits.sendall(sent)
        asked = time.monotonic()
        while waits.recv(10_000):
            pass
        assert time.monotonic() - asked < 4, "uvicorn's own waits 5 s, and for ever for half a head"


def test_a_request_that_has_begun_is_not_ended_with_its_connection(
    url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "HEAD_SECONDS", 0.1)
    read = runtime.executor.read
    monkeypatch.setattr(runtime.executor, "read", lambda *a, **b: (time.sleep(0.5), read(*a, **b))[1])
    assert post(url, GOOD)[0] == 200


def test_connections_that_say_nothing_shut_nobody_out(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "MAX_WAITING", 5)
    idle = connections(url, 9)
    assert post(url, GOOD)[0] == 200
    assert [one.recv(1) for one in idle[:5]] == [b""] * 5, "the longest first"
    assert len(Connection.waiting) <= 5
    for one in idle:
        one.close()


def test_who_leaves_while_images_of_others_are_decoded_gives_the_place_to_others(
    url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, prepared, prepare = threading.Event(), list[int](), runtime.executor.prepare
    monkeypatch.setattr(runtime, "most", 3)
    monkeypatch.setattr(runtime, "decoding", Room(1))
    monkeypatch.setattr(
        runtime.executor, "prepare", lambda *given: (prepared.append(1), held.wait(60), prepare(*given))[2]
    )
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url, GOOD)
        while not prepared:
            time.sleep(0.01)
        (leaves,) = connections(url, 1)
        body = json.dumps(GOOD).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        leaves.sendall(head.encode() + body)
        while len(runtime.decoding.waiting) < 1:
            time.sleep(0.01)
        leaves.close()
        until = time.monotonic() + 20
        while len(runtime.places) > 1:
            assert time.monotonic() < until, "who has left still has a place"
            time.sleep(0.05)
        held.set()
        assert first.result()[0] == 200
    assert len(prepared) == 1


def test_a_body_counts_until_its_images_are_decoded_and_is_then_let_go(
    url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # requests of other tests
    at, going = {"prepare": threading.Event(), "read": threading.Event()}, threading.Semaphore(0)

    def held(part: str) -> None:
        own = getattr(runtime.executor, part)
        monkeypatch.setattr(runtime.executor, part, lambda *a, **b: (at[part].set(), going.acquire(), own(*a, **b))[2])

    for part in at:
        held(part)
    monkeypatch.setattr(guards, "SMALL_BYTES", 0)
    monkeypatch.setattr(guards, "MAX_BODIES_BYTES", 8_000 + len(json.dumps(GOOD)) // 2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url, GOOD)
        assert at["prepare"].wait(20)
        assert post(url, b" " * 8_000)[0] == 429, "the first one's images are there still"
        going.release()
        assert at["read"].wait(20)
        assert [known.messages for known in gc.get_objects() if isinstance(known, Completion)] == [[]]
        assert post(url, b" " * 8_000)[0] == 400, "it is no JSON, and there is room for it"
        going.release()
        assert first.result()[0] == 200


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)]
)
def test_a_page_of_another_site_may_not_ask(url: str, site: str, status: int) -> None:
    assert post(url, GOOD, **{"Sec-Fetch-Site": site})[0] == status


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080", 200),
        ("http://localhost:8080", "localhost:8080", 200),
        ("http://[::1]:8080", "[::1]:8080", 200),
        ("http://127.0.0.1:9090", "127.0.0.1:8080", 403),
        ("http://evil.example", "192.168.0.7:8080", 403),
        ("http://evil.example:8080", "evil.example:8080", 403),  # a name that was made to lead here
        ("http://[evil", "[evil", 403),
        ("null", "192.168.0.7:8080", 403),
    ],
)
def test_without_tls_browsers_name_a_page_s_site_by_its_origin(url: str, origin: str, host: str, status: int) -> None:
    assert post(url, GOOD, Origin=origin, Host=host)[0] == status
    assert post(url, GOOD, Host=host)[0] == 200, "no page asks"


def test_who_takes_nothing_of_an_answer_holds_nobody_up(runtime: Runtime) -> None:
    unread = runtime.generate([opened()], "what?", max_new_tokens=4)
    next(unread)
    until = time.monotonic() + 20
    while runtime.places:
        assert time.monotonic() < until, "its answer is decoded, and it has a place still"
        time.sleep(0.01)
    assert list(runtime.generate([opened()], "what?", max_new_tokens=2))[-1].event == "end"


def test_a_piece_that_its_reader_does_not_take_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "SEND_SECONDS", 0.1)

    async def answer(_: Any, __: Any, send: Any) -> None:
        await send({})

    async def never(_: Any) -> None:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        asyncio.run(Patience(answer)({}, None, never))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_image_that_was_read_holds_neither_pixels_nor_a_decoder(kind: str) -> None:
    image, own = opened(kind), Image.new("RGB", (8, 8), "blue")
    image.load()
    let_go([image, own], pixels=True)
    assert not hasattr(image, "_decoder")
    with pytest.raises(ValueError, match="closed image"):
        image.convert("RGB")
    assert image.size == (84, 84)
    assert own.getpixel((0, 0)) == (0, 0, 255)


def test_a_room_holds_its_whole_and_what_is_larger_alone() -> None:
    room, inside, most = Room(10), list[int](), list[int]()

    def work(part: int) -> None:
        with room.of(part):
            inside.append(part)
            most.append(sum(inside))
            assert sum(inside) <= 10 or inside == [part]
            time.sleep(0.02)
            inside.remove(part)

    threads = [threading.Thread(target=work, args=(part,)) for part in (4, 4, 4, 30, 6, 10, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == len(threads), "nobody was inside with too many others"
    assert 8 <= max(total for total in most if total != 30) <= 10


def test_small_parts_do_not_pass_one_that_waits_for_a_large_one() -> None:
    room, order = Room(10), list[int]()

    def work(part: int) -> None:
        with room.of(part):
            order.append(part)

    with room.of(4):
        threads = [threading.Thread(target=work, args=(part,)) for part in (8, 3, 2)]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            while len(room.waiting) < number:
                time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert order[0] == 8
