"""An HTTP endpoint that speaks as OpenAI's does: `/v1/chat/completions`, streamed or whole, with images as data URLs.

What OpenAI has no word for travels in a field `vismem`: which memories a request allows, and where they were invoked.
"""

import base64
import binascii
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import iterate_in_threadpool, run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vismem.runtime.limits import MAX_STOPS, MAX_TOTAL_BYTES, NEW_TOKENS, RequestError, check_request
from vismem.serving.answering import Busy, Chunk, Runtime
from vismem.serving.health import status_routes

MAX_BODY_BYTES = MAX_TOTAL_BYTES * 4 // 3 + 1_000_000  # images as base64, and the rest
DONE = "data: [DONE]\n\n"

logger = logging.getLogger(__name__)


class Strict(BaseModel):
    """An object whose unknown fields are errors: what is not supported is never ignored in silence."""

    model_config = ConfigDict(extra="forbid")


class Text(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where an image is: a data URL alone, so that the server fetches nothing."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # no say: the model looks as it was trained


class ImagePart(Strict):
    """A part of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Strict):
    """The one turn of a request. The model reads its images first, wherever they stand, as it was trained."""

    role: Literal["user"]
    content: list[Annotated[Text | ImagePart, Field(discriminator="type")]]


class Extension(Strict):
    """What OpenAI has no word for."""

    memory: Literal["learned", "off", "short", "long"] = "learned"


class StreamOptions(Strict):
    """See OpenAI's."""

    include_usage: bool = False


class Completion(Strict):
    """A request. `n`, `top_p` and the like may have their neutral value only."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = Field(0.0, ge=0, le=2)  # greedy where a request does not say: a gated model's own answer
    seed: int = Field(0, ge=0, lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    top_p: Literal[1] = 1
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logprobs: Literal[False] | None = None
    user: str = ""
    vismem: Extension = Extension()


@dataclass(frozen=True)
class Refused(Exception):  # noqa: N818 - what a client did is no error of ours
    """An answer other than 200."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    field: str | None = None

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.field, "code": None}}

    def response(self) -> JSONResponse:
        """The body with its status."""
        return JSONResponse(self.body(), self.status)


def create_app(runtime: Runtime, name: str, token: str = "") -> FastAPI:
    """The endpoint over a runtime whose model is called `name`; with a `token`, callers must send it as a bearer's."""
    app = FastAPI(title="VisMem", openapi_url=None)
    app.include_router(status_routes(runtime))

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Any]) -> Response:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and request.url.path != "/health" and not hmac.compare_digest(sent.encode(), token.encode()):
            return Refused(401, "no such token: send `Authorization: Bearer TOKEN`", "authentication_error").response()
        response: Response = await call(request)
        return response

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "vismem"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(request: Request) -> Response:
        try:
            wanted = read_body(await _body(request))
            if wanted.model != name:
                raise Refused(404, f"there is no model '{wanted.model}' here, but '{name}'", field="model")
            chunks = await run_in_threadpool(begin, runtime, wanted)
            first = await run_in_threadpool(next, chunks)  # so that what goes wrong before it has a status
            reply = Reply(name, wanted)
            if not wanted.stream:
                return JSONResponse(reply.whole([first, *[chunk async for chunk in _read(chunks, request)]]))
            return StreamingResponse(events(reply, first, chunks, request), media_type="text/event-stream")
        except Refused as refused:
            runtime.metrics.refused.labels("invalid").inc()
            return refused.response()
        except RequestError as error:
            runtime.metrics.refused.labels("invalid").inc()
            return Refused(400, str(error)).response()
        except Busy as error:
            return Refused(429, str(error), "rate_limit_error").response()
        except Exception as error:
            logger.exception("an answer failed")
            return Refused(500, f"the model failed: {type(error).__name__}: {error}", "server_error").response()

    return app


async def events(reply: "Reply", first: Chunk, chunks: Iterator[Chunk], request: Request) -> AsyncIterator[str]:
    """The events of a stream."""
    try:
        for event in reply.events(first):
            yield event
        async for chunk in _read(chunks, request):
            for event in reply.events(chunk):
                yield event
        yield DONE
    except Exception as error:  # noqa: BLE001 - the status is sent: the client gets the reason as an event
        yield f"data: {json.dumps(Refused(500, f'the model failed: {error}', 'server_error').body())}\n\n"


async def _body(request: Request) -> bytes:
    """A request's body. Refused for one that is too large, at the first byte too many."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise Refused(413, f"the request is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)


async def _read(chunks: Iterator[Chunk], request: Request) -> AsyncIterator[Chunk]:
    """The chunks, until there are no more or the client has gone; then the answer is decoded no further."""
    try:
        async for chunk in iterate_in_threadpool(chunks):
            if await request.is_disconnected():
                return
            yield chunk
    finally:
        chunks.close()  # type: ignore[attr-defined]  # it is a generator


def read_body(body: bytes) -> Completion:
    """A request. Refused, with the field and the reason, for one that is not understood."""
    try:
        return Completion.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        several = place == "messages" and "too_long" in first["type"]
        reason = "send one user message: several turns are not supported" if several else first["msg"]
        raise Refused(400, f"{place or 'the body'}: {reason}", field=place or None) from None


def begin(runtime: Runtime, wanted: Completion) -> Iterator[Chunk]:
    """The chunks of the answer. RequestError or Refused for an unusable request, before any graph runs."""
    parts = wanted.messages[0].content
    files = [decoded_url(part.image_url.url) for part in parts if isinstance(part, ImagePart)]
    question = "\n".join(part.text for part in parts if isinstance(part, Text))
    asked = wanted.max_tokens if wanted.max_completion_tokens is None else wanted.max_completion_tokens
    longest = NEW_TOKENS if asked is None else asked
    images = check_request(files, question.encode(errors="surrogatepass"), longest)
    stop: Sequence[str] = [wanted.stop] if isinstance(wanted.stop, str) else wanted.stop
    return runtime.generate(
        images,
        question,
        max_new_tokens=longest,
        temperature=wanted.temperature,
        seed=wanted.seed,
        memory=wanted.vismem.memory,
        stop=stop,
    )


def decoded_url(url: str) -> bytes:
    """The file in a data URL. Refused for another URL, and for one that does not decode."""
    head, comma, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise Refused(400, "an image must be a data URL, such as data:image/png;base64,...", field="messages")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise Refused(400, f"an image's base64 does not decode: {error}", field="messages") from None


class Reply:
    """An answer as OpenAI's clients read it: whole, or as the events of a stream."""

    def __init__(self, model: str, wanted: Completion) -> None:
        self.usage = wanted.stream_options.include_usage
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.begun = False

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """The answer in one object. `vismem.memories`: kinds, and how many characters stand before each."""
        text, memories = "", []
        for chunk in chunks:
            text += chunk.text
            if chunk.event in ("short", "long"):
                memories.append({"kind": chunk.event, "place": len(text)})
        message = {"role": "assistant", "content": text}
        finish = chunks[-1].usage
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish.finish if finish else None}
        added = {"choices": [choice], "usage": _usage(chunks[-1]), "vismem": {"memories": memories}}
        return {**self.head, "object": "chat.completion", **added}

    def events(self, chunk: Chunk) -> Iterator[str]:
        """The events of one chunk; those of a memory have no text, and `vismem.memory` in their choice."""
        delta: dict[str, Any] = {} if self.begun else {"role": "assistant"}
        self.begun = True
        if chunk.text:
            delta["content"] = chunk.text
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
        if chunk.event in ("short", "long"):
            choice["vismem"] = {"memory": chunk.event}
        if delta or "vismem" in choice:
            yield self._event([choice])
        if chunk.usage:
            yield self._event([{"index": 0, "delta": {}, "finish_reason": chunk.usage.finish}])
            if self.usage:
                yield self._event([], usage=_usage(chunk))

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        event = {**self.head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


def _usage(end: Chunk) -> dict[str, Any] | None:
    if end.usage is None:
        return None
    read, written = end.usage.prompt_tokens, end.usage.tokens
    tokens = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {**tokens, "vismem": {"memories": end.usage.memories}}
