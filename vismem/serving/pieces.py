"""The pieces of an answer, and tokens on their way from the thread that decodes to the answer's reader."""

import math
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

TOGETHER = 0.01  # seconds of tokens that come together, where nobody says otherwise


@dataclass(frozen=True)
class Usage:
    """What an answer took."""

    finish: str  # "stop": ended by the model or a stop string; "length": at its limit
    prompt_tokens: int
    tokens: int  # words, memories not counted
    memories: dict[str, int]  # by kind
    first_token_seconds: float = field(compare=False)  # from the question's arrival to the first word or memory


@dataclass(frozen=True)
class Chunk:
    """One piece of an answer. An "end" chunk comes last; `text` may be empty."""

    text: str
    event: Literal["token", "short", "long", "end"]
    token: int | None = None  # the id behind it: a word, or an invoke token
    usage: Usage | None = None  # of the "end"


Stream = Generator[list[Chunk]]  # those that come together, in order


def one_by_one(stream: Stream) -> Iterator[Chunk]:
    """The chunks of a stream, which is closed with what is returned."""
    with closing(stream):
        for chunks in stream:
            yield from chunks


class Handover:
    """One thread puts tokens and the end, one takes.

    To wake the reader takes longer than to decode a token of a small model: it is woken for the first and for the end,
    and between them for those that came in a while.
    """

    def __init__(self, every: float) -> None:
        """`every`: seconds from one time that tokens are taken to the next, where there are any."""
        self.every, self.due = every, -math.inf
        self.tokens = deque[int]()
        self.ended = False
        self.error: BaseException | None = None
        self.ready = threading.Event()

    def put(self, token: int) -> None:
        """A token more."""
        self.tokens.append(token)
        if time.monotonic() >= self.due:  # asked after it is there: a reader that has not seen it waits for this
            self.ready.set()

    def end(self, error: BaseException | None = None) -> None:
        """None follows; `error`, which is kept, says why, where the answer is not whole."""
        self.error, self.ended = error, True
        self.ready.set()

    def take(self) -> tuple[list[int], bool]:
        """The tokens that came since, at least one unless they have ended, and whether they have."""
        while True:
            self.ready.clear()
            early = self.due - time.monotonic()
            if early > 0 and not self.ended:
                self.ready.wait(min(early, threading.TIMEOUT_MAX))  # the end alone wakes it
                continue
            ended = self.ended  # before the tokens: then none follows
            if (tokens := [self.tokens.popleft() for _ in range(len(self.tokens))]) or ended:
                self.due = time.monotonic() + self.every
                return tokens, ended
            self.ready.wait()
