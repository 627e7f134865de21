"""What a caller and a model exchange: a question with its images, the pieces of an answer, and what can go wrong.

No torch: the clients of a server and the model in this process (`vismem.inference`) share it.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from PIL import Image

from vismem.errors import UserError
from vismem.models.tokens import KINDS, marked_text
from vismem.runtime.access import TOKEN_VARIABLE
from vismem.runtime.chat import Chat
from vismem.runtime.images import upright, url_fault

AnyImage = str | Path | bytes | Image.Image
Images = AnyImage | Sequence[AnyImage]
BUSY_TYPE = "rate_limit_error"  # of an error over HTTP, as OpenAI calls it


class ServerError(UserError):
    """No answer came from a server: it failed, or one of the kinds below."""


class BusyError(ServerError):
    """The server has too much to do: ask again later."""


class RefusedError(ServerError):
    """The server does not accept the request: it would not do so later either."""


class UnauthorizedError(RefusedError):
    """The server asks for a token, and the caller has sent none, or another."""


class DisconnectedError(ServerError):
    """No server listens, or the connection broke before the answer's end."""


class DeadlineError(ServerError, TimeoutError):
    """The answer was not there in time."""


@dataclass(frozen=True)
class Token:
    """One piece of an answer. `event` is token, short, long (a memory was invoked here) or end, with text held back."""

    text: str
    event: str
    usage: Mapping[str, Any] | None = field(default=None, compare=False)  # of the end: see `pieces.Usage`

    @property
    def marked(self) -> str:
        """The text to show where invocations should be seen."""
        return marked_text(self.text, self.event)


def plain(tokens: Iterable[Token]) -> str:
    """The answer's text."""
    return "".join(token.text for token in tokens).strip()


def marked(tokens: Iterable[Token]) -> str:
    """The answer's text with ⟨short⟩ and ⟨long⟩ where memories were invoked."""
    return "".join(token.marked for token in tokens).strip()


@dataclass(frozen=True)
class Invoked:
    """A memory that the model invoked: its kind, and how many characters of the answer stand before it."""

    kind: str  # "short" or "long"
    place: int


class Answer(str):
    """The answer's text, and how it came about."""

    marked: str  # the text with ⟨short⟩ and ⟨long⟩ where memories were invoked
    invocations: tuple[Invoked, ...]
    pieces: tuple[Token, ...]
    usage: Mapping[str, Any]  # see `pieces.Usage`
    tokens: int  # decoded, memories not counted
    seconds: float  # until it was there; of a batch, all of it
    finished: bool  # ended by the model or a stop string, not at max_new_tokens

    @classmethod
    def of(cls, pieces: Sequence[Token], usage: Mapping[str, Any], seconds: float) -> "Answer":
        """From the pieces of its text and what it took."""
        answer = cls(plain(pieces))
        answer.marked, answer.pieces, answer.usage, answer.seconds = marked(pieces), tuple(pieces), usage, seconds
        answer.tokens, answer.finished = usage.get("tokens", 0), usage.get("finish") == "stop"
        said, invoked = "", list[Invoked]()
        for piece in pieces:
            if piece.event in KINDS:
                invoked.append(Invoked(piece.event, min(len(said.lstrip()), len(answer))))
            said += piece.text
        answer.invocations = tuple(invoked)
        return answer


@dataclass(frozen=True)
class Question:
    """What a client sends; see `answering.Runtime.stream`."""

    images: tuple[bytes, ...]  # encoded files
    asked: str | Chat
    memory: str = "learned"
    max_new_tokens: int | None = None  # as the server says
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


def check_seed(seed: int) -> None:
    """UserError for one that a server, which has 64 bits for it, would not take either."""
    if not (isinstance(seed, Integral) and 0 <= seed < 2**63):
        raise UserError(f"the seed is {seed}: it must be a whole number in 0..{2**63 - 1}")


@contextmanager
def sendable() -> Iterator[None]:
    """A block that writes a question down. RefusedError where it cannot: half a character, a number too large."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise RefusedError(f"the question cannot be sent: {error}") from None


def check_token(token: str) -> None:
    """UserError for one that no client can send."""
    if not (token.isascii() and token.isprintable()):
        raise UserError(f"{TOKEN_VARIABLE} must be one line of ASCII: HTTP and gRPC send no other header")


def encoded_images(images: Images) -> tuple[bytes, ...]:
    """One or more images as encoded files. UserError for a path without a file, and for a URL."""
    return tuple(map(encoded, [images] if isinstance(images, AnyImage) else images))


def encoded(image: AnyImage) -> bytes:
    """The image as an encoded file. UserError for a path without a file, and for a URL."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        upright(image).save(file, "PNG", compress_level=1)
        return file.getvalue()
    if fault := url_fault(str(image)):
        raise UserError(fault)
    try:
        return Path(image).read_bytes()
    except OSError as error:
        seen_from = "" if Path(image).is_absolute() else f" (from the current folder {Path.cwd()})"
        raise UserError(f"cannot read the image {image}: {error.strerror}{seen_from}") from None
