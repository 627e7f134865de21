"""Answers questions from an exported bundle, many at a time: one thread decodes, each caller reads its own pieces."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from PIL import Image

from vismem.generation.invocation import InvocationPolicy, Learned, Off
from vismem.generation.loop import DecodeLoop, Request, Row
from vismem.generation.onnx_executor import OnnxExecutor
from vismem.runtime.bundle import Bundle
from vismem.runtime.limits import NEW_TOKENS, RequestError
from vismem.runtime.prompt import TextStream

ROWS = 8  # answers at a time


@dataclass(frozen=True)
class Chunk:
    """One piece of an answer. An "end" chunk comes last; `text` may be empty."""

    text: str
    event: Literal["token", "short", "long", "end"]
    token: int | None = None  # the id behind it: a word, or an invoke token


@dataclass(eq=False)
class _Answer:
    """One answer between its caller and the thread that decodes it."""

    request: Request
    tokens: SimpleQueue[int | BaseException | None] = field(default_factory=SimpleQueue)  # None: it is finished
    gone: bool = False  # nobody reads it any more


class Runtime:
    """A bundle, ready to answer. It may be used by several threads at once; their answers are decoded together."""

    def __init__(
        self,
        bundle: Path | str,
        threads: int = 1,
        verified: bool = False,
        max_patches: int | None = None,
        rows: int = ROWS,
    ) -> None:
        """Open `bundle` with `threads` threads. Raises BundleError if it is missing or damaged.

        `verified`: the caller has just verified or written the bundle; its files are not hashed again. `max_patches`:
        limit of a request's image patches after resizing, whole and coarse ones together; None: no limit. `rows`:
        answers that are decoded at a time; others wait.
        """
        self.bundle, self.max_patches, self.rows = Bundle(Path(bundle), threads, verified), max_patches, rows
        self.executor = OnnxExecutor(self.bundle)
        self.waiting: deque[_Answer] = deque()
        self.changed = threading.Condition()  # of `waiting`
        self.thread: threading.Thread | None = None

    def generate(
        self,
        images: Sequence[Image.Image],
        prompt: str,
        *,
        max_new_tokens: int = NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
        memory: bool = True,
    ) -> Iterator[Chunk]:
        """Yield the answer's chunks; closing the iterator ends the work at the next token.

        `max_new_tokens` counts words, not memories; `temperature` 0 is greedy; `memory` False bars the model from
        invoking. Raises RequestError for an unusable request, before the first chunk.
        """
        if not images:
            raise RequestError("no image: send at least one with the question")
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
        question = self.executor.prepare(images, prompt, max_new_tokens, self.max_patches)
        policy: InvocationPolicy = Learned() if memory else Off()
        return self._chunks(Request([question], policy, max_new_tokens, temperature, seed))

    def _chunks(self, request: Request) -> Iterator[Chunk]:
        answer, text = _Answer(request), TextStream(self.bundle.tokenizer)
        self.executor.read(request.samples[0], memory=request.policy.limit != 0)  # beside the thread that decodes
        with self.changed:
            self.waiting.append(answer)
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="decode", daemon=True)
                self.thread.start()
            self.changed.notify()
        try:
            while (token := answer.tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                kind = self.executor.kinds.get(token)
                yield Chunk("", kind.value, token) if kind else Chunk(text.add(token), "token", token)
            yield Chunk(text.finish(), "end")
        finally:
            answer.gone = True

    # --- the thread that decodes ---

    def _run(self) -> None:
        loop, answers = DecodeLoop(self.executor), dict[Row, _Answer]()
        while True:
            try:
                self._admit(loop, answers)
                self._step(loop, answers)
            except Exception as error:  # noqa: BLE001 - its callers get it, and the next answers begin anew
                for answer in answers.values():
                    answer.tokens.put(error)
                self.executor.keep(())
                loop, answers = DecodeLoop(self.executor), {}

    def _admit(self, loop: DecodeLoop, answers: dict[Row, _Answer]) -> None:
        """Let waiting answers join while there are places; wait for one where there is nothing to decode."""
        while len(answers) < self.rows:
            with self.changed:
                if not answers:
                    self.changed.wait_for(lambda: self.waiting)
                if not self.waiting:
                    return
                answer = self.waiting.popleft()
            if answer.gone:
                continue
            try:
                (row,) = loop.join(answer.request)
            except Exception as error:  # noqa: BLE001 - the prefill of this one failed: the others go on
                answer.tokens.put(error)
            else:
                answers[row] = answer

    @staticmethod
    def _step(loop: DecodeLoop, answers: dict[Row, _Answer]) -> None:
        """Decode a token of every answer, and let those go that are finished or that nobody reads."""
        for row, answer in list(answers.items()):
            if answer.gone:
                loop.leave(row)
                del answers[row]
        for row, token in loop.step():
            answers[row].tokens.put(token)
            if row.finished:
                answers.pop(row).tokens.put(None)
        if not answers:
            loop.step()  # lets the last ones go
