"""Asks a served model over gRPC, and yields its answer piece by piece (`vismem infer`)."""

import json
import queue
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vismem.errors import UserError
from vismem.generation.invocation import mode_of
from vismem.runtime.limits import NEW_TOKENS, RequestError, check_request
from vismem.serving.repository import is_unary

REASONS = {  # part of a server's message: what it means for the caller
    "Exceeds maximum queue size": "it is busy, its queue is full: try again later",
    "Request timeout expired": "it is busy, the request waited too long: try again later",
    "all workers were busy": "it is busy, the request waited too long: try again later",
    "is not healthy": "its process is not healthy: restart `vismem serve`",
}


@dataclass(frozen=True)
class Token:
    """One piece of an answer. `event` is token, short, long (a memory was invoked here) or end."""

    text: str
    event: str
    usage: Mapping[str, Any] | None = field(default=None, compare=False)  # of the end: see `answering.Usage`

    @property
    def marked(self) -> str:
        """The text to show where invocations should be seen."""
        return {"token": self.text, "end": ""}.get(self.event, f"⟨{self.event}⟩")


def plain(tokens: Iterable[Token]) -> str:
    """The answer's text."""
    return "".join(token.text for token in tokens if token.event == "token").strip()


def marked(tokens: Iterable[Token]) -> str:
    """The answer's text with ⟨short⟩ and ⟨long⟩ where memories were invoked."""
    return "".join(token.marked for token in tokens).strip()


def infer(
    url: str,
    model: str,
    images: Sequence[bytes],
    prompt: str,
    *,
    stream: bool = True,
    max_new_tokens: int = NEW_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    memory: bool | str = True,
    stop: Sequence[str] = (),
    timeout: float = 60.0,
) -> Iterator[Token]:
    """Yield the pieces of one answer from the Triton server at `url` ("host:port", gRPC).

    `images` are encoded files; `memory` and `stop` are as in `Runtime.generate`. With `stream` each piece comes when it
    is decoded, else all at the end. `timeout` is the maximum wait in seconds for the next piece, and in the server's
    queue: it also catches a server whose model has died. Closing the iterator early cancels the answer on the server.
    Raises UserError where no server listens, for an unknown model, for a request that the server refuses, and at a
    timeout.
    """
    import tritonclient.grpc as triton
    from tritonclient.utils import np_to_triton_dtype

    arrays: dict[str, np.ndarray[Any, Any]] = {
        "IMAGE": np.array(images, dtype=object),
        "PROMPT": np.array([prompt.encode()], dtype=object),
        "MAX_NEW_TOKENS": np.array([max_new_tokens], dtype=np.int32),
        "TEMPERATURE": np.array([temperature], dtype=np.float32),
        "SEED": np.array([seed], dtype=np.int64),
        "MEMORY": np.array([mode_of(memory).encode()], dtype=object),
        "STREAM": np.array([stream]),
        **({"STOP": np.array([text.encode() for text in stop], dtype=object)} if stop else {}),
    }
    inputs = [
        triton.InferInput(name, value.shape, np_to_triton_dtype(value.dtype)).set_data_from_numpy(value)
        for name, value in arrays.items()
    ]
    replies: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client = triton.InferenceServerClient(url)
    answered = False
    try:
        if not _ready(client, url, model):
            raise UserError(f"the server at {url} has no model '{model}' ready: see the log of `vismem serve`")
        client.start_stream(callback=lambda result, error: replies.put((result, error)))
        client.async_stream_infer(model, inputs, timeout=int(timeout * 1e6), enable_empty_final_response=True)
        while True:
            try:
                result, error = replies.get(timeout=timeout)
            except queue.Empty:
                hint = "it may be busy or dead; try again, or restart `vismem serve`"
                raise UserError(f"model '{model}' at {url} sent nothing for {timeout:g} s: {hint}") from None
            if error is not None:
                answered = True
                reason = next((text for mark, text in REASONS.items() if mark in error.message()), error.message())
                raise UserError(f"model '{model}' at {url}: {reason}")
            pieces = [result.as_numpy(name) for name in ("TEXT", "EVENT", "USAGE")]
            if pieces[0] is not None:
                for text, event, usage in zip(*pieces, strict=True):
                    answered = answered or event == b"end"
                    yield Token(text.decode(), event.decode(), json.loads(usage) if usage else None)
            final = result.get_response().parameters.get("triton_final_response")
            if final is not None and final.bool_param:
                answered = True
                return
    finally:
        # A stream cancelled just as its last response goes out can keep the model from ever being unloaded.
        client.stop_stream(cancel_requests=not answered)
        client.close()


def main_infer(
    images: Sequence[str],
    prompt: str,
    *,
    url: str,
    model: str | None = None,
    stream: bool = False,
    memory: bool = True,
    max_new_tokens: int = NEW_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    timeout: float = 60.0,
    write: Callable[[str], None] = partial(print, end="", flush=True),  # noqa: B008
) -> None:
    """`vismem infer --image F [--image F ...] QUESTION [--stream] [--no-memory] [--url HOST:PORT] ...`.

    Writes the answer with its memory invocations marked, and a line's end; with `stream` piece by piece. `images` name
    files; without a `model` the server is asked which it has. Raises UserError (the CLI exits with 1).
    """
    files = read_images(images)
    try:
        check_request(files, prompt.encode(errors="surrogatepass"), max_new_tokens, images)
    except RequestError as error:
        raise UserError(str(error)) from None
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}: it must lie in 0..{2**63 - 1}")
    model = model or find_model(url)
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "timeout": timeout}
    tokens = infer(url, model, files, prompt, stream=stream, memory=memory, max_new_tokens=max_new_tokens, **options)
    if stream:
        for token in tokens:
            write(token.marked)
        write("\n")
    else:
        write(marked(tokens) + "\n")


def read_images(names: Sequence[str]) -> list[bytes]:
    """The bytes of image files that a person named. UserError for a URL, and for a file that cannot be read."""
    if web := [name for name in names if re.match(r"\w+://?\w", name)]:
        raise UserError(f"{web[0]} is an address, and --image takes a file: download it first")
    return [read_image(name) for name in names]


def read_image(name: str | Path) -> bytes:
    """The bytes of an image file. UserError for one that cannot be read."""
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the image {name}: {error.strerror}") from None


def find_model(url: str, name: str | None = None) -> str:
    """`name` if the server at `url` serves it, else its challenger if that is served, else UserError.

    Without a name: the one model that the server has, or its one release beside challengers.
    """
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(url) as client:
        if name is None:
            known = _served(client, url)
            released = [served for served in known if not served.endswith(challenger_name(""))]
            if len(found := released or known) == 1:
                return found[0]
            raise UserError(f"the server at {url} serves {', '.join(found) or 'no model'}: name one with --model")
        for candidate in (name, challenger_name(name)):
            if _ready(client, url, candidate):
                return candidate
    raise UserError(f"the server at {url} serves neither '{name}' nor '{challenger_name(name)}': name one with --model")


def challenger_name(name: str) -> str:
    """The name under which a version is served that the gate refused."""
    return f"{name}_challenger"


def _served(client: Any, url: str) -> list[str]:
    """The names of the models that a server counts requests of: its list of models is closed to clients."""
    with _explained(url):
        statistics = client.get_inference_statistics(client_timeout=10)
    return sorted({model.name for model in statistics.model_stats if not is_unary(model.name)})


def _ready(client: Any, url: str, model: str) -> bool:
    with _explained(url):
        ready: bool = client.is_model_ready(model, client_timeout=10)
    return ready


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what Triton's client says within the block into a one-line UserError."""
    from tritonclient.utils import InferenceServerException

    try:
        yield
    except InferenceServerException as error:
        if "UNAVAILABLE" in str(error.status()) or "DEADLINE" in str(error.status()):
            hint = "start one with `vismem serve` in another terminal, or name another with --url"
            raise UserError(f"no model server answers at {url}: {hint}") from None
        raise UserError(f"the server at {url}: {error.message()}") from None
