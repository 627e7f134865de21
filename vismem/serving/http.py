"""An HTTP endpoint that speaks as OpenAI's does: `/v1/chat/completions`, streamed or whole, with images as data URLs.

What OpenAI has no word for travels in a field `vismem`: which memories a request allows, and where they were invoked.
"""

import asyncio
import json
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import iterate_in_threadpool, run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vismem.runtime.access import token_refusal
from vismem.runtime.chat import said
from vismem.runtime.limits import MAX_TOTAL_BYTES, NEW_TOKENS, RequestError, check_request
from vismem.serving.answering import Busy, Runtime
from vismem.serving.completion import ARMS, Completion, Refused, Reply, decoded_url, read_body
from vismem.serving.exchange import BUSY_TYPE
from vismem.serving.health import status_routes
from vismem.serving.pieces import Chunk, Stream

MAX_BODY_BYTES = MAX_TOTAL_BYTES * 4 // 3 + 1_000_000  # images as base64, and the rest
MAX_BODIES_BYTES = 12 * MAX_BODY_BYTES  # of all requests that are read
MAX_MARKS = 300_000  # quotes and commas of a body: base64 has none, and every field and item has
BODY_SECONDS, SEND_SECONDS = 120, 60  # for a whole body; for a piece of an answer that its reader does not take
OTHER_SITES = ("cross-site", "same-site")  # where browsers say that a page of another site asks
SPARE_THREADS = 16
LOOK_SECONDS = 0.2  # between two looks whether who waits is still there
DONE = "data: [DONE]\n\n"

logger = logging.getLogger(__name__)


def create_app(runtime: Runtime, name: str, token: str = "") -> FastAPI:
    """The endpoint over a runtime whose model is called `name`; with a `token`, callers must send it as a bearer's.

    An arm that the runtime can decode is a model too, `name`-ARM, for clients that cannot send `vismem.memory`.
    """
    arms = {f"{name}-{arm}": mode for arm, mode in ARMS.items() if mode in runtime.executor.modes}
    modes = {name: "learned", **arms}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A thread for each answer that is waited for, and some for requests that are refused meanwhile.
        current_default_thread_limiter().total_tokens = runtime.rows + runtime.most + SPARE_THREADS
        yield

    app = FastAPI(title="VisMem", openapi_url=None, lifespan=lifespan)
    app.include_router(status_routes(runtime))

    bodies = _Bodies()
    app.add_middleware(_Patience)
    if token:
        app.add_middleware(_Guard, token=token)

    about = {"object": "model", "created": 0, "owned_by": "vismem"}
    shown = {model: {"id": model, "parent": name if model != name else None, **about} for model in modes}
    there = ", ".join(f"'{known}'" for known in modes)

    @app.exception_handler(HTTPException)
    def unknown(_: Request, error: HTTPException) -> Response:
        return Refused(error.status_code, error.detail).response()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": list(shown.values())}

    @app.get("/v1/models/{model:path}")
    def about_model(model: str) -> Response:
        if not model:  # a client's address ends with a slash
            return JSONResponse(models())
        if model not in shown:
            return Refused(404, f"there is no model '{model}' here, but {there}", field="model").response()
        return JSONResponse(shown[model])

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(request: Request) -> Response:
        try:
            if request.headers.get("sec-fetch-site") in OTHER_SITES:
                raise Refused(403, "pages of other sites may not ask", "authentication_error")
            async with bodies.read(request) as wanted:
                if wanted.model not in modes:
                    raise Refused(404, f"there is no model '{wanted.model}' here, but {there}", field="model")
                own = modes[wanted.model]
                mode = wanted.vismem.memory or own
                if wanted.model != name and mode != own:
                    raise Refused(400, f"'{wanted.model}' is memory '{own}', not '{mode}'", field="vismem")
                reply, gone = Reply(wanted.model, wanted), threading.Event()
                stream = await run_in_threadpool(begin, runtime, wanted, mode, reply.looks, gone)
                wanted.messages.clear()  # their images are decoded
            first = await _first(stream, request, gone)  # so that what goes wrong before it has a status
            if not wanted.stream:
                return JSONResponse(reply.whole([*first, *[c async for more in _read(stream, request) for c in more]]))
            return StreamingResponse(events(reply, first, stream, request), media_type="text/event-stream")
        except ClientDisconnect:  # while its body came: nobody reads an answer
            return Response(status_code=499)
        except Exception as error:  # noqa: BLE001 - the server's boundary
            refused = refusal(error)
            if isinstance(error, Refused | RequestError):
                runtime.metrics.refused.labels("busy" if refused.kind == BUSY_TYPE else "invalid").inc()
            return refused.response()

    return app


def refusal(error: Exception) -> Refused:
    """What a client is told of an error; one that is no refusal is logged."""
    match error:
        case Refused():
            return error
        case RequestError():
            return Refused(400, str(error))
        case Busy():
            return Refused(429, str(error), BUSY_TYPE)
    logger.error("an answer failed", exc_info=error)
    return Refused(500, f"the model failed: {type(error).__name__}: {error}", "server_error")


class _Guard:
    """Lets in who sends the token, and all to /health. FastAPI's own middleware would hide that a client has left."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI application."""
        guarded = scope["type"] == "http" and scope["path"] != "/health"
        if guarded and (refused := token_refusal(self.token, Headers(scope=scope).get("authorization", ""))):
            return await Refused(401, refused, "authentication_error").response()(scope, receive, send)
        await self.app(scope, receive, send)


async def events(reply: Reply, first: list[Chunk], stream: Stream, request: Request) -> AsyncIterator[str]:
    """The events of a stream; those that come together are sent together."""
    try:
        yield "".join(chain.from_iterable(map(reply.events, first)))
        async for chunks in _read(stream, request):
            if sent := "".join(chain.from_iterable(map(reply.events, chunks))):
                yield sent
        yield DONE
    except Exception as error:  # noqa: BLE001 - the status is sent: the client gets the reason as an event
        yield f"data: {json.dumps(refusal(error).body())}\n\n"


class _Patience:
    """Ends an answer whose reader takes nothing of it any more and keeps the connection."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI application."""

        async def send_in_time(message: Any) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        await self.app(scope, receive, send_in_time)


class _Bodies:
    """The bodies of all requests that are read."""

    def __init__(self) -> None:
        self.bytes = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[Completion]:
        """A block with a request, which counts until it ends.

        Refused for one that is too large, at the first byte too many, too slow, or not understood.
        """
        body, size, marks = bytearray(), 0, 0
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for part in request.stream():
                        body += part
                        size, self.bytes = size + len(part), self.bytes + len(part)
                        marks += part.count(b'"') + part.count(b",")
                        if size > MAX_BODY_BYTES:
                            raise Refused(413, f"the request is larger than {MAX_BODY_BYTES} bytes")
                        if self.bytes > MAX_BODIES_BYTES:
                            raise Refused(429, "too many large requests at a time: ask again later", BUSY_TYPE)
                        if marks > MAX_MARKS:
                            raise Refused(413, "the request has too many fields")
            except TimeoutError:
                raise Refused(408, f"the request did not come within {BODY_SECONDS} seconds") from None
            wanted = await run_in_threadpool(read_body, body)
            del body
            yield wanted
        finally:
            self.bytes -= size


async def _first(stream: Stream, request: Request, gone: threading.Event) -> list[Chunk]:
    """The first chunks; `gone` is set where the client leaves before they come."""
    waiting = asyncio.ensure_future(run_in_threadpool(next, stream))
    while not (await asyncio.wait({waiting}, timeout=LOOK_SECONDS))[0]:
        if await request.is_disconnected():
            gone.set()
    return waiting.result()


async def _read(stream: Stream, request: Request) -> AsyncIterator[list[Chunk]]:
    """The chunks, until there are no more or the client has gone; then the answer is decoded no further."""
    try:
        async for chunks in iterate_in_threadpool(stream):
            if await request.is_disconnected():
                return
            yield chunks
    finally:
        stream.close()


def begin(runtime: Runtime, wanted: Completion, mode: str, looks: list[Any], gone: threading.Event) -> Stream:
    """The chunks of the answer. RequestError, Refused or Busy where there are none, before any graph runs."""
    chat = [message.turn() for message in wanted.messages]
    files = [decoded_url(url) for message in wanted.messages for url in message.urls()]
    asked = wanted.max_tokens if wanted.max_completion_tokens is None else wanted.max_completion_tokens
    longest = NEW_TOKENS if asked is None else asked
    images = check_request(files, said(chat).encode(errors="surrogatepass"), longest)
    stop: Sequence[str] = [wanted.stop] if isinstance(wanted.stop, str) else wanted.stop
    return runtime.stream(
        images,
        chat,
        max_new_tokens=longest,
        temperature=wanted.temperature,
        seed=secrets.randbits(63) if wanted.seed is None else wanted.seed,
        memory=mode,
        stop=stop,
        looks=looks if wanted.vismem.attention else None,
        gone=gone,
    )
