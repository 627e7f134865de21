"""The client's side of `vismem api`: a question as OpenAI's API has it, and the events of its stream as pieces."""

import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from vismem.runtime.chat import messages_of, one_turn
from vismem.serving.connection import Connection
from vismem.serving.exchange import (
    BUSY_TYPE,
    BusyError,
    DisconnectedError,
    Question,
    RefusedError,
    ServerError,
    Token,
    UnauthorizedError,
    sendable,
)

BUSY = (429, 503)
JSON = {"Content-Type": "application/json"}
LIMITS = httpx2.Limits(max_connections=None, keepalive_expiry=2)  # seconds: before uvicorn closes it, at 5


class OverHttp:
    """The server whose API begins at `address` (http:// or https://, with or without /v1)."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address.rstrip("/").removesuffix("/v1") + "/v1"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.connection = Connection(lambda: httpx2.AsyncClient(headers=headers, timeout=None, limits=LIMITS))

    async def models(self) -> list[str]:
        """The names of what it serves, arms left out: a question says its memory. ServerError as `pieces` raises it."""
        async with self._asked("GET", "/models") as response:
            return [model["id"] for model in json.loads(await response.aread())["data"] if not model.get("parent")]

    async def pieces(self, model: str, question: Question, stream: bool, timeout: float) -> AsyncGenerator[Token, None]:
        """The answer piece by piece, always as a stream; closing it ends the work on the server."""
        usage: dict[str, Any] = {}
        with sendable():
            body = json.dumps(_body(model, question), ensure_ascii=False, allow_nan=False).encode()
        async with self._asked("POST", "/chat/completions", content=body, headers=JSON) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if (data := line.removeprefix("data: ")) == "[DONE]":
                    yield Token("", "end", usage or None)
                    return
                event = json.loads(data)
                if "error" in event:
                    kind = BusyError if event["error"].get("type") == BUSY_TYPE else ServerError
                    raise kind(f"the server at {self.address}: {event['error']['message']}")
                for choice in event["choices"]:
                    if memory := choice.get("vismem", {}).get("memory"):
                        yield Token("", memory)
                    if text := choice["delta"].get("content"):
                        yield Token(text, "token")
                    if choice["finish_reason"]:
                        usage["finish"] = choice["finish_reason"]
                if counted := event.get("usage"):
                    usage |= {"prompt_tokens": counted["prompt_tokens"], "tokens": counted["completion_tokens"]}
                    usage |= counted.get("vismem", {})

    @asynccontextmanager
    async def _asked(self, method: str, path: str, **request: Any) -> AsyncIterator[httpx2.Response]:
        """A reply of status 200, and what goes wrong with it as a ServerError. Deadlines are the caller's."""
        try:
            async with self.connection.get().stream(method, self.address + path, **request) as response:
                if response.status_code != 200:
                    status, said = response.status_code, _message(await response.aread())
                    kind = BusyError if status in BUSY else RefusedError if status < 500 else ServerError
                    kind = UnauthorizedError if status == 401 else kind
                    raise kind(f"the server at {self.address} (status {status}): {said}")
                yield response
        except httpx2.ConnectError as error:
            hint = "start one with `vismem api`, or give another address"
            raise DisconnectedError(f"no server answers at {self.address} ({error}): {hint}") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise DisconnectedError(
                f"the connection to {self.address} broke: {error or type(error).__name__}"
            ) from None


def _body(model: str, question: Question) -> dict[str, Any]:
    # "image/png" whatever it is: the server looks at the bytes
    urls = (f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in question.images)
    asked, messages = question.asked, list[dict[str, Any]]()
    for message in messages_of(one_turn(asked, len(question.images)) if isinstance(asked, str) else asked):
        parts = [
            {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part
            for part in message["content"]
        ]
        messages.append({"role": message["role"], "content": parts})
    return {
        "model": model,
        "messages": messages,
        "max_completion_tokens": question.max_new_tokens,
        "temperature": question.temperature,
        "seed": question.seed,
        "stop": question.stop,
        "stream": True,
        "stream_options": {"include_usage": True},
        "vismem": {"memory": question.memory},
    }


def _message(body: bytes) -> str:
    """What an error's body says."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode(errors="replace")
