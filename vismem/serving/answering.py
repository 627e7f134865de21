"""Answers questions, many at a time: one thread decodes, each caller reads the pieces of its own answer."""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

from PIL import Image

from vismem.generation.invocation import mode_of
from vismem.generation.loop import DecodeLoop, Request, Row
from vismem.runtime.chat import Chat, check_chat, one_turn, said
from vismem.runtime.images import let_go, unread
from vismem.runtime.limits import MAX_TOTAL_PIXELS, RequestError, Room, check_stops
from vismem.runtime.prompt import TextStream
from vismem.serving.metrics import Metrics
from vismem.serving.pieces import STOPPED, TOGETHER, Chunk, Handover, Pieces, Stream, Usage, one_by_one
from vismem.serving.request_log import RequestLog
from vismem.serving.served import Served

ROWS, WAITING = 8, 32  # answers at a time, and that wait for a place, at most
PREPARING = os.cpu_count() or 1  # questions that are read at a time
CACHE_BYTES = 256_000_000  # of images and prompts that may be asked again
LOGGED = 1_000_000  # pixels that an answer keeps for the request log; more are decoded again
FAULTS = 8  # in a row, without a token between, after which nothing is decoded any more: a GPU that broke stays so
LEFT = "nobody reads the answer"


class Busy(Exception):  # noqa: N818 - of the moment, no error
    """There are too many questions: ask again later."""


@dataclass(eq=False)
class _Answer:
    """One answer between its caller and the thread that decodes it."""

    arrived: float  # by time.monotonic()
    gone: threading.Event  # nobody reads it any more
    tokens: Handover
    request: Request = field(init=False)  # once it is prepared
    row: Row | None = None  # once it has joined
    first: float = math.nan  # seconds until its first token

    def check(self) -> None:
        """Busy where nobody reads it any more."""
        if self.gone.is_set():
            raise Busy(LEFT)


class Runtime:
    """An executor, ready to answer. It may be used by several threads at once; their answers are decoded together."""

    def __init__(self, executor: Served, rows: int = ROWS, waiting: int = WAITING) -> None:
        """`rows`: answers that are decoded at a time; `waiting` others wait, or are prepared, at most."""
        self.executor, self.rows, self.most = executor, rows, waiting
        self.places = WeakSet[_Answer]()  # from when a question comes until its answer is decoded, or has no reader
        self.waiting: deque[_Answer] = deque()
        self.changed = threading.Condition()  # of `places`, `waiting` and `closed`
        self.preparing = threading.BoundedSemaphore(PREPARING)
        self.decoding = Room(MAX_TOTAL_PIXELS)  # several copies of an image are made on the way
        self.thread: threading.Thread | None = None
        self.closed = False
        self.answers: dict[Row, _Answer] = {}  # that are decoded
        self.faults = 0  # of the executor, since a token was last decoded
        self.stepped = -math.inf  # when a token was last decoded, by time.monotonic()
        self.metrics = Metrics(lambda: len(self.waiting), lambda: len(self.answers))
        self.log: RequestLog | None = None

    @classmethod
    def open(
        cls,
        bundle: Path | str,
        threads: int = 1,
        max_patches: int | None = None,
        rows: int = ROWS,
        cache_bytes: int = CACHE_BYTES,
    ) -> "Runtime":
        """A runtime over a bundle's graphs; for `threads` and verified files see Bundle, for the rest OnnxExecutor."""
        from vismem.generation.onnx_executor import OnnxExecutor
        from vismem.runtime.bundle import Bundle

        return cls(OnnxExecutor(Bundle(Path(bundle), threads), max_patches, cache_bytes), rows)

    def generate(self, images: Sequence[Image.Image], prompt: str | Chat, **options: Any) -> Iterator[Chunk]:
        """The chunks of `stream`, one by one."""
        return one_by_one(self.stream(images, prompt, **options))

    def stream(
        self,
        images: Sequence[Image.Image],
        prompt: str | Chat,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        memory: bool | str = True,
        stop: Sequence[str] = (),
        looks: list[Any] | None = None,
        gone: threading.Event | None = None,
        every: float = TOGETHER,
    ) -> Stream:
        """Yield the answer's chunks, those of `every` seconds together but for the first, until it ends.

        Closing the generator ends the work at the next token, as setting `gone` does. With `stop`, which is looked for
        in the chunks, `every` is TOGETHER at most.

        `prompt`: a question (see `one_turn` for its images' places) or a conversation. `max_new_tokens` counts words,
        not memories; `temperature` 0 is greedy; `memory` is a name of the executor's modes, or True for "learned" and
        False for "off". The answer ends before the first of the `stop` strings. To `looks` each memory's
        `attention.Look` is appended, before the chunk that follows it (by the torch executor). Images read from files
        are closed. RequestError for an unusable request, Busy where too many wait, before an image is decoded.
        """
        arrived, longest = time.monotonic(), self.executor.new_tokens if max_new_tokens is None else max_new_tokens
        if not images:
            raise RequestError("no image: send at least one with the question")
        if longest < 1:
            raise RequestError(f"max_new_tokens is {longest}: it must be at least 1")
        mode, modes = mode_of(memory), self.executor.modes
        if mode not in modes:
            raise RequestError(f"is '{mode}': it must be one of {', '.join(modes)}", "MEMORY")
        chat = one_turn(prompt, len(images)) if isinstance(prompt, str) else prompt
        check_chat(chat, len(images))
        check_stops(stop)
        answer = _Answer(arrived, gone or threading.Event(), Handover(min(every, TOGETHER) if stop else every))
        self._take_place(answer)
        try:
            pixels = sum(image.width * image.height for image in images)
            logged = [] if not self.log else images if pixels < LOGGED else [unread(image) for image in images]
            with self.decoding.of(pixels, answer.check):
                answer.check()
                sample = self.executor.prepare(images, chat, longest)
                let_go(images, pixels=logged is not images)
        except BaseException as error:
            self.places.discard(answer)
            self.metrics.failures.inc(isinstance(error, Exception) and not isinstance(error, RequestError | Busy))
            raise
        answer.request = Request([sample], modes[mode], longest, temperature, seed, looks=looks)
        asked = {"question": said(chat), "memory": mode, "max_new_tokens": longest, "temperature": temperature}
        return self._chunks(answer, stop, logged, asked)

    def close(self) -> None:
        """End all answers, each with Busy, and the thread that decodes."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        if self.thread:
            self.thread.join()
        if self.log:
            self.log.close()

    def _take_place(self, answer: _Answer) -> None:
        """Busy where there is none. The place is free again when the answer is dropped."""
        with self.changed:
            why = STOPPED if self.closed else f"{self.most} questions are waiting: ask again later"
            if self.closed or len(self.places) >= self.rows + self.most:
                self.metrics.refused.labels("busy").inc()
                raise Busy(why)
            self.places.add(answer)

    def _chunks(self, answer: _Answer, stop: Sequence[str], images: Any, asked: Mapping[str, Any]) -> Stream:
        """The chunks; what ends them early is counted."""
        request, text = answer.request, TextStream(self.executor.tokenizer, stop)
        pieces = Pieces(text)
        try:
            with self.preparing:  # beside the thread that decodes
                answer.check()
                self.executor.read(request.samples[0], memory=request.policy.limit != 0)
            with self.changed:
                if self.closed:
                    raise Busy(STOPPED)
                self.waiting.append(answer)
                if self.thread is None:
                    self.thread = threading.Thread(target=self._run, name="decode", daemon=True)
                    self.thread.start()
                self.changed.notify()
            while True:
                (tokens, ended), chunks = answer.tokens.take(), list[Chunk]()
                for token in tokens:
                    chunks += pieces.add(token, self.executor.kinds.get(token))
                    if text.stopped:
                        break
                if ended or text.stopped:
                    break
                yield chunks
            if answer.tokens.error and not text.stopped:
                if chunks:
                    yield chunks
                raise answer.tokens.error
            assert answer.row is not None
            by_itself = text.stopped or answer.row.tokens[-1][0] in self.executor.stops
            finish, words, memories = "stop" if by_itself else "length", pieces.words, dict(pieces.memories)
            usage = Usage(finish, answer.row.prompt.length, words, memories, answer.first)
            chunks += pieces.finish(usage)
            if request.max_new_tokens > 1:  # with 1 it is a probe
                self.metrics.answered(str(asked["memory"]), pieces.memories)
                if self.log:
                    took = {"answer": text.passed, "seconds": time.monotonic() - answer.arrived}
                    self.log.add(images, {**asked, **took, **asdict(usage)})
            yield chunks
        except Busy:
            self.metrics.refused.labels("busy").inc(not answer.gone.is_set())
            raise
        except Exception:
            self.metrics.failures.inc()
            raise
        finally:
            answer.gone.set()
            self.places.discard(answer)

    def _run(self) -> None:
        loop = DecodeLoop(self.executor)
        try:
            with self.executor.running():
                while not self.closed and self.faults < FAULTS:
                    try:
                        self._admit(loop)
                        self._step(loop)
                    except Exception as error:  # noqa: BLE001 - its callers get it, and the next answers begin anew
                        self.faults += 1
                        failed, self.answers = self.answers, {}
                        for answer in failed.values():
                            answer.tokens.end(error)
                        loop = DecodeLoop(self.executor)
                        self.executor.keep(())
        finally:  # also where this thread dies
            with self.changed:
                self.closed = True
            for answer in (*self.answers.values(), *self.waiting):  # nothing joins `waiting` any more
                answer.tokens.end(Busy(STOPPED))

    def _admit(self, loop: DecodeLoop) -> None:
        """Let one waiting answer join, so that those that run wait for one prompt at most; with none, wait for one."""
        with self.changed:
            for left in [answer for answer in self.waiting if answer.gone.is_set()]:
                self.waiting.remove(left)
                left.tokens.end(Busy(LEFT))
            if not self.answers:
                self.changed.wait_for(lambda: self.waiting or self.closed)
            if not self.waiting or self.closed or len(self.answers) == self.rows:
                return
        loop.settle()  # what fails here is no fault of the one that joins
        with self.changed:
            answer = self.waiting.popleft()
        try:
            answer.check()
            (answer.row,) = loop.join(answer.request)
        except Exception as error:  # noqa: BLE001 - the prefill of this one failed: the others go on
            answer.tokens.end(error)
            self.faults += not isinstance(error, Busy)
        except BaseException:  # this thread dies, and the answer is nowhere else
            answer.tokens.end(Busy(STOPPED))
            raise
        else:
            self.answers[answer.row] = answer

    def _step(self, loop: DecodeLoop) -> None:
        """Decode a token of every answer, and let those go that are finished or that nobody reads."""
        for row, answer in list(self.answers.items()):
            if answer.gone.is_set():
                loop.leave(row)
                self.answers.pop(row).tokens.end(Busy(LEFT))
        for row, token in (decided := loop.step()):
            kind, answer = self.executor.kinds.get(token), self.answers[row]
            (self.metrics.memories.labels(kind.value) if kind else self.metrics.tokens).inc()
            if row.decisions == 1:
                answer.first = round(time.monotonic() - answer.arrived, 6)
                self.metrics.first_token.observe(answer.first)
            answer.tokens.put(token)
            if row.finished:
                self.answers.pop(row).tokens.end()
                self.places.discard(answer)
        if not self.answers:
            loop.step()  # lets the last ones go
        if decided:
            self.stepped, self.faults = time.monotonic(), 0
