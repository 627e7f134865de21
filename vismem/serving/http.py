"""An HTTP endpoint that speaks as OpenAI's does: `/v1/chat/completions`, streamed or whole, with images as data URLs.

What OpenAI has no word for travels in a field `vismem`: which memories a request allows, and where they were invoked.
"""

import asyncio
import json
import logging
import secrets
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any, TypeVar

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import iterate_in_threadpool, run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vismem.runtime.chat import merged, said
from vismem.runtime.limits import LOOK_SECONDS, RequestError, check_request
from vismem.serving.answering import Busy, Runtime
from vismem.serving.completion import ARMS, Completion, Refused, Reply, decoded_url
from vismem.serving.exchange import BUSY_TYPE
from vismem.serving.guards import Bodies, Guard, Patience, from_other_site
from vismem.serving.health import status_routes
from vismem.serving.pieces import Chunk, Stream

SPARE_THREADS = 16
DONE = "data: [DONE]\n\n"
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # said to proxies, of a stream
FIELDS = {  # of a request to Triton: OpenAI's, and what a message calls it
    "IMAGE": ("messages", "the conversation"),
    "PROMPT": ("messages", "the conversation's text"),
    "STOP": ("stop", "stop"),
    "MEMORY": ("vismem.memory", "vismem.memory"),
}
T = TypeVar("T")

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

    app = FastAPI(title="VisMem", openapi_url=None, lifespan=lifespan, redirect_slashes=False)
    app.include_router(status_routes(runtime))

    bodies = Bodies()
    app.add_middleware(Patience)
    if token:
        app.add_middleware(Guard, token=token)

    about = {"object": "model", "created": 0, "owned_by": "vismem"}
    shown = {model: {"id": model, "parent": name if model != name else None, **about} for model in modes}
    there = ", ".join(f"'{known}'" for known in modes)

    @app.exception_handler(HTTPException)
    def unknown(_: Request, error: HTTPException) -> Response:
        return Refused(error.status_code, error.detail, headers=error.headers or {}).response()

    def no_model(name: str) -> Refused:
        return Refused(404, f"there is no model '{name}' here, but {there}", field="model", code="model_not_found")

    @app.api_route("/v1/models", methods=["GET", "HEAD"])
    def models() -> dict[str, Any]:
        return {"object": "list", "data": list(shown.values())}

    @app.api_route("/v1/models/{model:path}", methods=["GET", "HEAD"])
    def about_model(model: str) -> Response:
        if not model:  # a client's address ends with a slash
            return JSONResponse(models())
        if model not in shown:
            return no_model(model).response()
        return JSONResponse(shown[model])

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(request: Request) -> Response:
        try:
            if from_other_site(request.headers):
                raise Refused(403, "pages of other sites may not ask", "authentication_error")
            async with bodies.read(request) as wanted:
                if wanted.model not in modes:
                    raise no_model(wanted.model)
                own = modes[wanted.model]
                mode = wanted.vismem.memory or own
                if wanted.model != name and mode != own:
                    raise Refused(400, f"'{wanted.model}' is memory '{own}', not '{mode}'", field="vismem")
                reply, gone = Reply(wanted.model, wanted), threading.Event()
                stream = await _watched(request, gone, lambda: begin(runtime, wanted, mode, reply.looks, gone))
                wanted.messages.clear()  # their images are decoded
            # Before the reply begins, so that what goes wrong until then has a status.
            first = await _watched(request, gone, lambda: next(stream))
            if not wanted.stream:
                return JSONResponse(reply.whole([*first, *[c async for more in _read(stream, request) for c in more]]))
            sent = events(reply, first, stream, request)
            return StreamingResponse(sent, media_type="text/event-stream", headers=UNBUFFERED)
        except ClientDisconnect:  # while its body came: nobody reads an answer
            return Response(status_code=499)
        except Exception as error:  # noqa: BLE001 - the server's boundary
            refused = refusal(error)
            if isinstance(error, Refused | RequestError):
                runtime.metrics.refused.labels("busy" if refused.kind == BUSY_TYPE else "invalid").inc()
            return refused.response()

    return app


def refusal(error: Exception) -> Refused:
    """What a client is told of an error; one that is no refusal is told in full in the log alone, by a number."""
    match error:
        case Refused():
            return error
        case RequestError():
            field, called = FIELDS.get(error.field, ("messages", error.field))
            return Refused(400, f"{called} {error.reason}".strip(), field=field, code=error.code)
        case Busy():
            return Refused(429, str(error), BUSY_TYPE)
    number = uuid.uuid4().hex[:8]
    logger.error("an answer failed (%s)", number, exc_info=error)
    return Refused(500, f"the model failed: {type(error).__name__} ({number} in the server's log)", "server_error")


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


async def _watched(request: Request, gone: threading.Event, call: Callable[[], T]) -> T:
    """What a call in a thread returns; `gone` is set where the client leaves before."""
    waiting = asyncio.ensure_future(run_in_threadpool(call))
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
    chat = merged(message.turn() for message in wanted.messages)
    files = [decoded_url(url) for message in wanted.messages for url in message.urls()]
    asked = wanted.max_tokens if wanted.max_completion_tokens is None else wanted.max_completion_tokens
    longest = runtime.executor.new_tokens if asked is None else asked
    images = check_request(files, said(chat).encode(errors="surrogatepass"), longest)
    return runtime.stream(
        images,
        chat,
        max_new_tokens=longest,
        temperature=wanted.temperature,
        seed=secrets.randbits(63) if wanted.seed is None else wanted.seed % 2**63,
        memory=mode,
        stop=wanted.stop,
        looks=looks if wanted.vismem.attention else None,
        gone=gone,
    )
