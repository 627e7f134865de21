"""A conversation as the model is asked: turns of text, and the places among it where images stand. No torch."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Final

from vismem.runtime.limits import MAX_PROMPT_BYTES, RequestError

MARK = "<image>"  # in the text of a question: an image stands here
MAX_MESSAGES_BYTES = 6 * MAX_PROMPT_BYTES  # JSON may write a character as \uXXXX
IMAGE: Final = None  # in the parts of a turn, likewise
PARTS = '{"type": "text", "text": ...} and {"type": "image"}'
FOLLOWS = {"start": ("system", "user"), "system": ("user",), "user": ("assistant", "end"), "assistant": ("user",)}


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str  # system, user or assistant
    parts: tuple[str | None, ...]  # texts, and IMAGE where one stands


Chat = Sequence[Turn]


def one_turn(question: str, images: int) -> Chat:
    """A question about so many images: they stand at its marks if there is one for each, else before the text."""
    texts = question.split(MARK)
    if not images or len(texts) != images + 1:
        return [Turn("user", (IMAGE,) * images + (question,))]
    parts = [part for text in texts for part in (IMAGE, text)]
    return [Turn("user", tuple(part for part in parts[1:] if part != ""))]


def parse_messages(data: bytes) -> Chat:
    """The turns of `read_messages` from JSON. RequestError for what is none, or too long."""
    if len(data) > MAX_MESSAGES_BYTES:
        raise RequestError(f"MESSAGES holds {len(data)} bytes: the limit is {MAX_MESSAGES_BYTES}")
    try:
        return read_messages(json.loads(data))
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, RequestError) else f"it is not JSON: {error}"
        raise RequestError(f"MESSAGES: {reason}") from None


def read_messages(messages: Any) -> Chat:
    """Turns from messages as OpenAI writes them, but with `{"type": "image"}` where an image stands.

    Those of one role that follow each other are one turn. RequestError for what is no such message.
    """
    if not (isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages)):
        raise RequestError("messages must be a list of objects with `role` and `content`")
    return merged(Turn(str(message.get("role")), tuple(_parts(message.get("content")))) for message in messages)


def messages_of(chat: Chat) -> list[dict[str, Any]]:
    """The messages that `read_messages` reads as these turns."""
    return [{"role": turn.role, "content": [*map(_written, turn.parts)]} for turn in chat]


def _written(part: str | None) -> dict[str, str]:
    return {"type": "image"} if part is IMAGE else {"type": "text", "text": part}


def _parts(content: Any) -> Iterator[str | None]:
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        match part:
            case {"type": "text", "text": str(text)}:
                yield text
            case {"type": "image"}:
                yield IMAGE
            case _:
                raise RequestError(f"a message's content must be a text, or a list of {PARTS}")


def joined(parts: Iterable[str | None]) -> tuple[str | None, ...]:
    """The parts, texts that stand side by side made one, on lines of their own."""
    found: list[str | None] = []
    for is_image, group in groupby(parts, lambda part: part is IMAGE):
        run = list(group)
        found += run if is_image else ["\n".join(map(str, run))]
    return tuple(found)


def merged(turns: Iterable[Turn]) -> Chat:
    """The turns, those of one role that follow each other made one; texts side by side are lines."""
    runs = groupby(turns, lambda turn: turn.role)
    return [Turn(role, joined(part for turn in run for part in turn.parts)) for role, run in runs]


def said(chat: Chat) -> str:
    """All texts."""
    return "\n".join(part for turn in chat for part in turn.parts if part)


def check_chat(chat: Chat, images: int) -> None:
    """RequestError where the turns do not follow each other, or have other places than there are images."""
    roles = ["start", *(turn.role for turn in chat), "end"]
    for before, role in pairwise(roles):
        if role not in FOLLOWS.get(before, ()):
            raise RequestError(
                f"the turns are {', '.join(roles[1:-1]) or 'none'}: at most one of the system first, then user and "
                "assistant in turn, a user's last"
            )
    places = sum(turn.parts.count(IMAGE) for turn in chat)
    if places != images:
        raise RequestError(f"the turns have places for {places} images, and {images} were sent")
    if any(IMAGE in turn.parts for turn in chat if turn.role != "user"):
        raise RequestError("images stand in a user's turns only")
    if not any(part and part.strip() for part in chat[-1].parts):
        raise RequestError("the last turn has no text: ask a question about the image")
