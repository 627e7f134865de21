"""Asks a served model, over HTTP (`vismem api`) or Triton's gRPC (`vismem serve`): the address says which.

from vismem import Client

client = Client("http://127.0.0.1:8080")  # or grpc://127.0.0.1:8001
print(client.ask("photo.png", "how many cups?").marked)
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager
from functools import lru_cache, partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from vismem.errors import UserError
from vismem.generation.invocation import mode_of
from vismem.runtime.access import own_token
from vismem.runtime.chat import Chat, check_chat
from vismem.runtime.limits import NEW_TOKENS, RequestError, check_request
from vismem.serving.exchange import (
    Answer,
    DeadlineError,
    DisconnectedError,
    Images,
    Question,
    RefusedError,
    Token,
    check_seed,
    encoded_images,
)
from vismem.serving.over_grpc import OverGrpc
from vismem.serving.over_http import OverHttp

T = TypeVar("T")
TIMEOUT = 60.0  # seconds


class AsyncClient:
    """Asks questions from asyncio. They share a connection, which closes with the client."""

    def __init__(
        self, address: str, *, model: str | None = None, token: str | None = None, timeout: float = TIMEOUT
    ) -> None:
        """`address`: http://, https://, grpc:// or grpcs://HOST:PORT, which end with s where the server has TLS.

        `model`: its name there; without, the one that is served. `token`: what a server with VISMEM_API_TOKEN asks for.
        `timeout`: see `ask`.
        """
        scheme, mark, place = address.partition("://")
        if scheme not in ("http", "https", "grpc", "grpcs") or not (mark and place):
            raise UserError(f"{address} is no address of a server: give http://HOST:PORT or grpc://HOST:PORT")
        self.address, self.model, self.timeout, self._given = address, model, timeout, model is not None
        grpc, tls = scheme.startswith("grpc"), scheme == "grpcs"
        self.server = OverGrpc(place.rstrip("/"), token or "", tls) if grpc else OverHttp(address, token or "")

    async def ask(self, images: Images, question: str | Chat, **options: Any) -> Answer:
        """The answer to a question about one or more images (paths, PIL images, or encoded files as bytes).

        `question`: a text or a conversation, as for `VisMem.answer`.
        `options`: `memory` "learned", "off", "short" or "long", which memories the model may invoke; `max_new_tokens`
        (120); `temperature` 0 is greedy; `seed`; `stop`, up to 4 texts, the answer ends before the first of them;
        `timeout`, the deadline of the whole answer in seconds. UserError for an image that is not there; RefusedError,
        BusyError, DisconnectedError, DeadlineError, and ServerError where the model failed.
        """
        started = time.perf_counter()
        pieces = [piece async for piece in self._pieces(False, images, question, **options)]
        return Answer.of(pieces, pieces[-1].usage or {}, time.perf_counter() - started)

    def stream(self, images: Images, question: str | Chat, **options: Any) -> AsyncGenerator[Token, None]:
        """The pieces of the answer that `ask` gives, when they are decoded.

        An "end" comes last, with `usage`. Closing the iterator ends the work on the server.
        """
        return self._pieces(True, images, question, **options)

    async def find_model(self, name: str | None = None) -> str:
        """`name` if it is served, else its challenger if that is, else UserError.

        Without a name: the one model that is served, or the one release beside challengers.
        """
        async with self._until(asyncio.get_running_loop().time() + self.timeout, self.timeout):
            return await self._find_model(name)

    async def _find_model(self, name: str | None) -> str:
        if name is None or isinstance(self.server, OverHttp):
            known = await self.server.models()
            released = [served for served in known if not is_challenger(served)]
            found = [name] if name in known else [] if name else released or known
            if len(found) == 1:
                return found[0]
            raise UserError(f"the server at {self.address} serves {', '.join(known) or 'no model'}: name one of them")
        for candidate in (name, challenger_name(name)):
            if await self.server.ready(candidate):
                return candidate
        raise UserError(f"the server at {self.address} serves neither '{name}' nor '{challenger_name(name)}'")

    @asynccontextmanager
    async def _until(self, deadline: float, seconds: float) -> AsyncIterator[None]:
        """DeadlineError where the block is not done at `deadline`, in the event loop's time; `seconds` it had."""
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except TimeoutError:
            hint = "it may be busy or dead; ask again with a longer timeout, or restart it"
            raise DeadlineError(f"no whole answer from {self.address} in {seconds:g} s: {hint}") from None

    async def _pieces(
        self,
        stream: bool,
        images: Images,
        question: str | Chat,
        *,
        memory: bool | str = "learned",
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        timeout: float | None = None,
    ) -> AsyncGenerator[Token, None]:
        seconds = self.timeout if timeout is None else timeout
        deadline, end = asyncio.get_running_loop().time() + seconds, None
        files = encoded_images(images)
        if not isinstance(question, str):
            try:
                check_chat(question, len(files))
            except RequestError as error:
                raise RefusedError(str(error)) from None
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        asked = Question(files, question, mode_of(memory), max_new_tokens, temperature, seed, stops)
        async with self._until(deadline, seconds):
            self.model = self.model or await self._find_model(None)
        async with aclosing(self.server.pieces(self.model, asked, stream, seconds)) as pieces:
            while True:
                try:
                    async with self._until(deadline, seconds):  # around a step: the caller's own code is not cancelled
                        piece = await anext(pieces, None)
                except RefusedError:
                    if not self._given:  # another may be served by now: the next question finds it
                        self.model = None
                    raise
                if piece is None:
                    break
                if piece.event == "end":
                    end = piece  # given on when the connection has ended too: who stops there breaks off nothing
                else:
                    yield piece
        if end is None:
            raise DisconnectedError(f"the server at {self.address} ended the answer half-way: see its log")
        yield end


class Client:
    """Asks questions; it may be used by several threads at once. One thread beside them talks to all servers."""

    def __init__(
        self, address: str, *, model: str | None = None, token: str | None = None, timeout: float = TIMEOUT
    ) -> None:
        """See AsyncClient."""
        self._client = AsyncClient(address, model=model, token=token, timeout=timeout)

    @property
    def model(self) -> str | None:
        """Its name on the server; None until a first answer, where none was given."""
        return self._client.model

    def ask(self, images: Images, question: str | Chat, **options: Any) -> Answer:
        """See AsyncClient."""
        return _run(self._client.ask(images, question, **options))

    def find_model(self, name: str | None = None) -> str:
        """See AsyncClient."""
        return _run(self._client.find_model(name))

    def stream(self, images: Images, question: str | Chat, **options: Any) -> Generator[Token, None, None]:
        """See AsyncClient."""
        pieces: SimpleQueue[Token | BaseException | None] = SimpleQueue()

        async def read() -> None:
            try:
                async with aclosing(self._client._pieces(True, images, question, **options)) as answer:
                    async for piece in answer:
                        pieces.put(piece)
                pieces.put(None)
            except Exception as error:  # noqa: BLE001 - the caller's thread raises it
                pieces.put(error)

        reading = _start(read())
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            reading.cancel()


def _run(ask: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine."""
    asking = _start(ask)
    try:
        return asking.result()
    finally:
        asking.cancel()


def _start(ask: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine in another thread: a notebook's own has an event loop that is running."""
    return asyncio.run_coroutine_threadsafe(ask, _loop(os.getpid()))


@lru_cache(maxsize=1)
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of all clients in this process, in a thread that ends with it: a forked process has no threads."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="vismem-client", daemon=True).start()
    return loop


def main_infer(
    images: Sequence[str],
    prompt: str,
    *,
    url: str,
    model: str | None = None,
    stream: bool = False,
    memory: bool | str = "learned",
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    timeout: float = TIMEOUT,
    write: Callable[[str], None] = partial(print, end="", flush=True),  # noqa: B008
) -> None:
    """`vismem infer --image F [--image F ...] QUESTION [--stream] [--memory MODE] [--url ADDRESS] ...`.

    Writes the answer with its memory invocations marked, and a line's end; with `stream` piece by piece. `images` name
    files; `url` without a scheme is of gRPC. Raises UserError (the CLI exits with 1).
    """
    files = encoded_images(images)
    try:
        longest = NEW_TOKENS if max_new_tokens is None else max_new_tokens
        check_request(files, prompt.encode(errors="surrogatepass"), longest, images)
    except RequestError as error:
        raise UserError(str(error)) from None
    check_seed(seed)
    client = own_client(url, model=model, timeout=timeout)
    options: dict[str, Any] = {"memory": memory, "max_new_tokens": max_new_tokens}
    options |= {"temperature": temperature, "seed": seed}
    if stream:
        for piece in client.stream(files, prompt, **options):
            write(piece.marked)
        write("\n")
    else:
        write(client.ask(files, prompt, **options).marked + "\n")


def own_client(url: str, model: str | None = None, timeout: float = TIMEOUT) -> Client:
    """A client of a server of ours, with this process's token; an address without a scheme is of gRPC."""
    return Client(url if "://" in url else f"grpc://{url}", model=model, token=own_token(), timeout=timeout)


def is_challenger(name: str) -> bool:
    """Whether this is the `challenger_name` of a model."""
    return name.endswith(challenger_name(""))


def challenger_name(name: str) -> str:
    """The name under which a version is served that the gate refused."""
    return f"{name}_challenger"
