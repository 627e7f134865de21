"""The HTTP endpoint in this process, and requests to it."""

import base64
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tiny
import uvicorn
from fastapi import FastAPI

from vismem.services import HOST, free_ports
from vismem.serving.answering import Runtime
from vismem.serving.guards import Connection


def url_of(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def messages(images: Sequence[bytes], question: str) -> list[dict[str, Any]]:
    shown = [{"type": "image_url", "image_url": {"url": url_of(image)}} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of a server in this process."""
    port = free_ports({"http": 0})["http"]
    settings: dict[str, Any] = {"log_level": "error", "timeout_graceful_shutdown": 1, "http": Connection, "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app, host=HOST, port=port, **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://{HOST}:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def endless(runtime: Runtime) -> Iterator[None]:
    """Within the block no token ends an answer, and 2,000 of them take twice as long as `ends` waits."""
    executor: Any = runtime.executor
    stops, executor.stops, choose = executor.stops, frozenset(), executor.choose
    executor.choose = lambda asked: (time.sleep(0.02), choose(asked))[1]
    try:
        yield
    finally:
        executor.stops = stops
        del executor.choose


def ends(runtime: Runtime) -> None:
    """Wait until nothing is decoded any more."""
    until = time.monotonic() + 20
    while runtime.executor.sources:  # type: ignore[attr-defined]
        assert time.monotonic() < until, "a row is still decoded"
        time.sleep(0.02)


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


GOOD: dict[str, Any] = {"model": "tiny", "messages": messages(tiny.samples()[0].images, "what?"), "max_tokens": 2}
