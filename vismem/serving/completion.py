"""A chat completion as OpenAI writes it: the request, the reply, whole or streamed, and what is said of a wrong one."""

import json
import random
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as field_of
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from vismem.generation.invocation import BASE_MODES
from vismem.models.tokens import KINDS
from vismem.runtime.chat import IMAGE, Turn, joined
from vismem.runtime.images import decoded_base64
from vismem.runtime.limits import MAX_NEW_TOKENS, MAX_STOPS
from vismem.serving.exchange import BUSY_TYPE
from vismem.serving.pieces import Chunk

MAX_TURNS, MAX_PARTS = 256, 256  # of a conversation, and of a turn
MAX_REASON = 500  # characters that are told of what is not understood: a wrong name may be as long as a body
Word = Annotated[str, Field(max_length=256)]
Nothing = Annotated[list[Any], Field(max_length=0)]
ARMS = {"vanilla": "vanilla", "no_memory": "off", "short_only": "short", "long_only": "long"}  # of `evaluate`: mode


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
    detail: Literal["auto", "low", "high", "original"] = "auto"  # no say: the model looks as it was trained


class ImagePart(Strict):
    """A part of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[Text | ImagePart, Field(discriminator="type")]


class Message(Strict):
    """A turn. Its images stand where they stand in it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part] = Field(max_length=MAX_PARTS)
    name: Word | None = None  # changes nothing
    refusal: None = None  # these five: of an earlier reply, as OpenAI's package writes it out
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _listed(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    def turn(self) -> Turn:
        """Without the images' files. Texts side by side are lines of one."""
        role = "system" if self.role == "developer" else self.role
        return Turn(role, joined(part.text if isinstance(part, Text) else IMAGE for part in self.content))

    def urls(self) -> list[str]:
        """Of its images."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


def null_is_default(model: type[BaseModel], value: Any, field: ValidationInfo) -> Any:
    """A validator: null says as little as a field that is not there, as OpenAI has it."""
    return model.model_fields[str(field.field_name)].default if value is None else value


class Extension(Strict):
    """What OpenAI has no word for."""

    _nulls = field_validator("*", mode="before")(classmethod(null_is_default))

    memory: Literal[*BASE_MODES] | None = None  # type: ignore[valid-type]  # None: what `model` says
    attention: bool = False  # whether the reply says where each memory looked


class StreamOptions(Strict):
    """See OpenAI's."""

    _nulls = field_validator("*", mode="before")(classmethod(null_is_default))

    include_usage: bool = False
    include_obfuscation: bool = True  # OpenAI's padding of events, which there is none of here


class PlainText(Strict):
    """The one format of answers."""

    type: Literal["text"]


class Neutral(Strict):
    """What OpenAI's clients know and no answer changes by: of most, only the value that asks for nothing is taken."""

    n: Literal[1] | None = None
    top_p: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: PlainText | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["auto", "none"] | None = None  # of no tools
    functions: Nothing | None = None
    function_call: Literal["auto", "none"] | None = None
    audio: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    web_search_options: None = None
    parallel_tool_calls: bool | None = None  # this and the rest: whatever they are
    store: bool | None = None
    metadata: Annotated[dict[Word, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    prompt_cache_key: Word | None = None
    prompt_cache_retention: Word | None = None
    safety_identifier: Word | None = None
    service_tier: Word | None = None
    user: Word | None = None


class Completion(Neutral):
    """A request."""

    model: Word
    messages: list[Message] = Field(min_length=1, max_length=MAX_TURNS)
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2)  # greedy where a request does not say: a gated model's own answer
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)  # None: another one for every request
    stop: list[str] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    vismem: Extension = Extension()

    # Not of `messages`, which would all become Python's objects first.
    _nulls = field_validator("temperature", "stop", "stream", "stream_options", "vismem", mode="before")(
        classmethod(null_is_default)
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop


@dataclass(eq=False)
class Refused(Exception):  # noqa: N818 - what a client did is no error of ours
    """An answer other than 200."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    field: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field_of(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.field, "code": self.code}}

    def response(self) -> JSONResponse:
        """The body with its status, and the headers that belong to it."""
        headers = dict(self.headers)
        if self.kind == BUSY_TYPE:
            headers["Retry-After"] = str(random.randint(1, 5))  # seconds, so that not all come again together
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def read_body(body: bytes | bytearray) -> Completion:
    """A request. Refused, with the field and the reason, for one that is not understood."""
    try:
        return Completion.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))[:MAX_REASON]
        raise Refused(400, f"{place or 'the body'}: {first['msg'][:MAX_REASON]}", field=place or None) from None


def decoded_url(url: str) -> bytes:
    """The file in a data URL. Refused for another URL, and for one that does not decode."""
    if not re.match("data:image/[^,]{0,100};base64,", url):
        raise Refused(400, "an image must be a data URL, such as data:image/png;base64,...", field="messages")
    try:
        return decoded_base64(url)
    except ValueError as error:
        raise Refused(400, f"an image's base64 does not decode: {error}", field="messages") from None


class Reply:
    """An answer as OpenAI's clients read it: whole, or as the events of a stream."""

    def __init__(self, model: str, wanted: Completion) -> None:
        self.usage = wanted.stream_options.include_usage
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.looks = list[Any]()  # where memories looked, if that was asked for
        self.begun, self.memories, self.looked = False, 0, 0

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """The answer in one object. `vismem.memories`: kinds, and how many characters stand before each."""
        text, memories = "", list[dict[str, Any]]()
        for chunk in chunks:
            text += chunk.text
            if chunk.event in KINDS:
                memories.append({"kind": chunk.event, "place": len(text)})
        for memory, look in zip(memories, self.looks, strict=False):
            memory["attention"] = asdict(look)
        message = {"role": "assistant", "content": text}
        finish = chunks[-1].usage
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish.finish if finish else None}
        added = {"choices": [choice], "usage": _usage(chunks[-1]), "vismem": {"memories": memories}}
        return {**self.head, "object": "chat.completion", **added}

    def events(self, chunk: Chunk) -> Iterator[str]:
        """The events of one chunk; those of a memory have no text, and `vismem.memory` in their choice.

        Where it looked, if that was asked for, follows in `vismem.attention` of an event of its own.
        """
        for look in self.looks[self.looked : self.memories]:
            self.looked += 1
            yield self._event([{"index": 0, "delta": {}, "finish_reason": None, "vismem": {"attention": asdict(look)}}])
        delta: dict[str, Any] = {} if self.begun else {"role": "assistant"}
        self.begun = True
        if chunk.text:
            delta["content"] = chunk.text
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
        if chunk.event in KINDS:
            choice["vismem"] = {"memory": chunk.event}
            self.memories += 1
        if delta or "vismem" in choice:
            yield self._event([choice])
        if chunk.usage:
            yield self._event([{"index": 0, "delta": {}, "finish_reason": chunk.usage.finish}])
            if self.usage:
                yield self._event([], usage=_usage(chunk))

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        event = {**self.head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(event)}\n\n"


def _usage(end: Chunk) -> dict[str, Any] | None:
    if end.usage is None:
        return None
    read, written = end.usage.prompt_tokens, end.usage.tokens
    tokens = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    ours = {"memories": end.usage.memories, "first_token_seconds": end.usage.first_token_seconds}
    return {**tokens, "vismem": ours}
