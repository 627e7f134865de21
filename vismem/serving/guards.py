"""What keeps one HTTP client from holding up the others: tokens, other sites' pages, slow senders and readers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any, ClassVar
from urllib.parse import urlsplit

import h11
from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from uvicorn.protocols.http.h11_impl import H11Protocol

from vismem.runtime.access import token_refusal
from vismem.runtime.limits import MAX_TOTAL_BYTES
from vismem.serving.completion import Completion, Refused, read_body
from vismem.serving.exchange import BUSY_TYPE

MAX_BODY_BYTES = MAX_TOTAL_BYTES * 4 // 3 + 1_000_000  # images as base64, and the rest
MAX_BODIES_BYTES = 12 * MAX_BODY_BYTES  # of all requests that are read, beyond which only small ones are
SMALL_BYTES, MAX_BODIES = 1_000_000, 256  # of a small request; requests that are read
MAX_MARKS = 300_000  # quotes and commas of a body: base64 has none, and every field and item has
BODY_SECONDS, PAUSE_SECONDS, BODY_RATE = 120, 10, 100_000  # for a whole body, without a byte, bytes per second at least
SEND_SECONDS = 60  # for a piece of an answer that its reader does not take
HEAD_SECONDS, MAX_WAITING = 10, 256  # for a request's head; connections that wait for one
OTHER_SITES = ("cross-site", "same-site")  # where browsers say that a page of another site asks


class Connection(H11Protocol):
    """A connection that ends where no request begins in time. uvicorn's own waits for ever for half a head.

    When more than MAX_WAITING wait, the one that has waited longest ends: who sends at once is never shut out.
    """

    waiting: ClassVar[dict["Connection", asyncio.TimerHandle]] = {}  # the longest first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the loop."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._stop()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """A head that is complete has a response to come; what is left of a body behind its response is none."""
        super().handle_events()
        if self.conn.our_state in (h11.SEND_RESPONSE, h11.SEND_BODY):
            self._stop()

    def on_response_complete(self) -> None:
        """Wait for the next request, before one that is there already begins."""
        self._wait()
        super().on_response_complete()

    def _wait(self) -> None:
        self._stop()
        self.waiting[self] = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        if len(self.waiting) > MAX_WAITING:
            longest = next(iter(self.waiting))
            longest._stop()
            longest.transport.close()

    def _stop(self) -> None:
        if timer := self.waiting.pop(self, None):
            timer.cancel()


def from_other_site(headers: Headers) -> bool:
    """Whether a page asks that this server did not send, as browsers say it.

    To a server without TLS they say it by the page's origin alone, and not where that page made its own name lead here:
    only addresses and `localhost` are no other's.
    """
    if site := headers.get("sec-fetch-site"):
        return site in OTHER_SITES
    if not (origin := headers.get("origin")):
        return False
    try:
        page = urlsplit(origin)
        own = page.netloc == headers.get("host") and (page.hostname == "localhost" or ip_address(page.hostname or ""))
    except ValueError:
        return True
    return not own


class Guard:
    """Lets in who sends the token, and all to /health. FastAPI's own middleware would hide that a client has left."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI application."""
        guarded = scope["type"] == "http" and scope["path"] != "/health"
        if guarded and (said := token_refusal(self.token, Headers(scope=scope).get("authorization", ""))):
            refused = Refused(401, said, "authentication_error", code="invalid_api_key")
            return await refused.response()(scope, receive, send)
        await self.app(scope, receive, send)


class Patience:
    """Ends an answer whose reader takes nothing of it any more and keeps the connection."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI application."""

        async def send_in_time(message: Any) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        await self.app(scope, receive, send_in_time)


class Bodies:
    """The bodies of all requests that are read."""

    def __init__(self) -> None:
        self.bytes = self.requests = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[Completion]:
        """A block with a request, which counts until it ends.

        Refused for one that is too large, at the first byte too many, not understood, or too slow: each byte gives
        1 / BODY_RATE seconds more, PAUSE_SECONDS ahead at most.
        """
        body, size, marks, time = bytearray(), 0, 0, asyncio.get_running_loop().time
        due, end = time() + PAUSE_SECONDS, time() + BODY_SECONDS
        self.requests += 1
        try:
            if self.requests > MAX_BODIES:
                raise Refused(429, "too many requests at a time: ask again later", BUSY_TYPE)
            try:
                async with asyncio.timeout_at(due) as limit:
                    async for part in request.stream():
                        body += part
                        size, self.bytes = size + len(part), self.bytes + len(part)
                        marks += part.count(b'"') + part.count(b",")
                        if size > MAX_BODY_BYTES:
                            raise Refused(413, f"the request is larger than {MAX_BODY_BYTES} bytes")
                        if size > SMALL_BYTES and self.bytes > MAX_BODIES_BYTES:
                            raise Refused(429, "too many large requests at a time: ask again later", BUSY_TYPE)
                        if marks > MAX_MARKS:
                            raise Refused(413, "the request has too many fields")
                        due = min(due + len(part) / BODY_RATE, time() + PAUSE_SECONDS, end)
                        limit.reschedule(due)
            except TimeoutError:
                raise Refused(408, f"the request came too slowly: send {BODY_RATE // 1000} kB a second") from None
            wanted = await run_in_threadpool(read_body, body)
            del body
            yield wanted
        finally:
            self.bytes -= size
            self.requests -= 1
