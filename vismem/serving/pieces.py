"""The pieces of an answer, and tokens on their way from the thread that decodes to the answer's reader."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

from vismem.models.kinds import MemoryKind
from vismem.runtime.prompt import TextStream

Event = Literal["token", "short", "long", "end"]
STOPPED = "the server stops: ask again later"
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
    event: Event
    token: int | None = None  # the id behind it: a word, or an invoke token
    usage: Usage | None = None  # of the "end"


Stream = Generator[list[Chunk]]  # those that come together, in order


def one_by_one(stream: Stream) -> Iterator[Chunk]:
    """The chunks of a stream, which is closed with what is returned."""
    with closing(stream):
        for chunks in stream:
            yield from chunks


class Pieces:
    """Makes an answer's tokens into chunks, each memory at its place in the text.

    Where a stop string may have begun, what follows is held back with it, memories too.
    """

    def __init__(self, text: TextStream) -> None:
        self.text, self.sent = text, 0
        self.held = deque[tuple[int, Event, int]]()  # with the characters of the answer up to its end
        self.words, self.memories = 0, Counter[str]()

    def add(self, token: int, kind: MemoryKind | None) -> list[Chunk]:
        """The chunks that are certain with this token, a word or an invocation of that kind."""
        if kind:
            self.memories[kind.value] += 1
        else:
            self.words += 1
            self.text.add(token)
        self.held.append((len(self.text.passed) + len(self.text.held), kind.value if kind else "token", token))
        return self._certain()

    def finish(self, usage: Usage) -> list[Chunk]:
        """What was held back, and the end."""
        self.text.finish()
        return [*self._certain(), Chunk(self.text.passed[self.sent :], "end", usage=usage)]

    def _certain(self) -> list[Chunk]:
        chunks, passed = list[Chunk](), self.text.passed
        while self.held and (self.text.stopped or self.held[0][0] <= len(passed)):
            end, event, token = self.held.popleft()
            chunks.append(Chunk(passed[self.sent : end], event, token))
            self.sent = min(end, len(passed))
        return chunks


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
