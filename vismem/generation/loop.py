"""The decode loop: rows join and leave at any token, each with its own policy, sampling, limits and seed (Sec. 3.2).

The loop keeps the rows' records and decides when a memory comes; what computes is an `Executor`. A row's answer does
not depend on the rows beside it, nor on when they come and go. Numpy alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vismem.generation.invocation import NONE, Choices, InvocationPolicy, StepView, row_key, row_uniforms
from vismem.generation.types import LATENT, Invocation
from vismem.models.kinds import MemoryKind
from vismem.models.tokens import KINDS

UNCHANGED = tuple(range(len(KINDS)))
COLDEST = 1e-6  # a lower temperature is greedy: scores divided by it would leave float32
TIE = 1e-4  # nats; by rounding two equal rows of the head, which is in float32, differ by less


@dataclass(frozen=True)
class Request:
    """Rows that join together: `group_size` answers for each sample."""

    samples: Sequence[Any]  # what the executor prefills, each with its `id`
    policy: InvocationPolicy
    max_new_tokens: int
    temperature: float = 0.0  # up to COLDEST it is greedy
    seed: int = 0
    group_size: int = 1
    prompt: Any = None  # the samples' prompts, where they are encoded already
    looks: list[Any] | None = None  # the torch executor appends each memory's `attention.Look` to it


@dataclass(frozen=True)
class Prefilled:
    """A sample's prompt, in tokens."""

    length: int
    visual: int  # of them, of images and videos
    added: int = 0  # of them, appended by the policy: they count as the answer's latents


@dataclass(eq=False)
class Row:
    """One answer in the making, and its record."""

    request: Request
    sample_id: str
    key: str
    limit: int  # memories at most
    uniform: NDArray[np.float64]  # for sampling, one number per decision
    prompt: Prefilled
    standing: tuple[int, ...]  # the kind that is invoked where the short, where the long invoke token is drawn
    spare: int  # decisions for which there is room
    tokens: list[tuple[int, bool, float]] = field(default_factory=list)  # id, in the loss or not, log-probability
    invocations: list[Invocation] = field(default_factory=list)
    decisions: int = 0
    answer_length: int = 0
    at_delimiter: bool = True  # the last token was a delimiter, or there is none
    remembering: bool = False  # a memory was inserted, and no word has followed it yet
    finished: bool = False

    def insert(self, ids: Sequence[int]) -> None:
        """Tokens that were not sampled."""
        self.tokens += [(token, False, 0.0) for token in ids]

    @property
    def may_invoke(self) -> bool:
        """Whether a memory may come before the next word."""
        return not (self.finished or self.remembering or len(self.invocations) >= self.limit)


@dataclass(frozen=True)
class Asked:
    """What the next token of each of R rows is drawn by."""

    temperature: NDArray[np.float64]  # (R,)
    uniform: NDArray[np.float64]  # (R,)
    barred: NDArray[np.bool_]  # (R, 2) where a short, where a long invoke token may not be sampled
    declines: NDArray[np.bool_]  # (R,) a word is drawn in place of an invoke token
    standing: NDArray[np.int64]  # (R, 2) the kind that is invoked where the short, where the long one is drawn
    forced: Choices  # (R,) the kind that is invoked, whatever is drawn

    def settled(self, drawn: Sequence[int], words: int) -> list[int]:
        """The columns that count where these were drawn. Behind `words` columns stand the short and the long invoke."""
        columns = []
        for column, standing, forced in zip(drawn, self.standing.tolist(), self.forced.tolist(), strict=True):
            invoked = standing[column - words] if forced == NONE and column >= words else forced
            columns.append(column if invoked == NONE else words + invoked)
        return columns


def greedy_columns(scores: Any) -> Any:
    """(R,) the best column of scores (R, V + 2), both arrays of NumPy or both of torch.

    Of two invoke tokens within TIE it is the short one's: stage II starts from equal rows, and where no reward told
    them apart the rest is rounding, which differs between runtimes and batches.
    """
    best, short, long = scores.argmax(1), scores[:, -2], scores[:, -1]
    return best - 1 * ((best == scores.shape[1] - 1) & (long < short + TIE))


class Executor(Protocol):
    """What computes: it holds R rows, in the order in which they joined."""

    kinds: dict[int, MemoryKind]  # by invoke token
    ends: dict[MemoryKind, int]  # end tokens
    delimiters: frozenset[int]
    anywhere: bool  # whether the model may also call memory between them
    stops: frozenset[int]

    def limit(self, asked: int | None) -> int:
        """Memories per answer at most, where a policy asks for `asked`."""

    def join(self, request: Request, limit: int) -> list[Prefilled]:
        """Prefill a request's rows; what each sample's prompt is. `limit`: memories per answer at most."""

    def choose(self, asked: Asked) -> tuple[list[int], list[float]]:
        """The next token of every row, and its log-probability under the sampling distribution."""

    def append(self, tokens: Sequence[int]) -> None:
        """Append a token to every row."""

    def form(self, kind: MemoryKind, rows: Sequence[int]) -> Any:
        """Memories (rows, N, d) of rows whose last token is their invoke token; an array that takes index lists."""

    def insert(self, kind: MemoryKind, rows: Sequence[int], memory: Any) -> None:
        """Append memories (rows, N, d) and their end token."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""


class DecodeLoop:
    """Rows that are decoded together. After `join`, every `step` gives each row a token until it is finished."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.rows: list[Row] = []  # as the executor holds them; finished ones go once they are half
        self._decided: list[int] = []  # their next tokens, not appended yet

    def join(self, request: Request) -> list[Row]:
        """Add a request's rows, grouped by sample, in order; they take the places of finished ones."""
        self.settle()
        limit = min(self.executor.limit(request.policy.limit), request.max_new_tokens)  # a word follows every memory
        standing = tuple(KINDS.index(request.policy.invoked(kind)) for kind in KINDS)
        rows = []
        for sample, prompt in zip(request.samples, self.executor.join(request, limit), strict=True):
            for member in range(request.group_size):
                key = row_key(sample.id, member)
                uniform = row_uniforms(request.seed, key, "sample", request.max_new_tokens + limit)
                rows.append(Row(request, sample.id, key, limit, uniform, prompt, standing, len(uniform)))
                rows[-1].insert([LATENT] * prompt.added)
        self.rows += rows
        return rows

    def settle(self) -> None:
        """Append what was decided, and let finished rows go: what is left of a step, before others join."""
        self._feed(tidy=True)

    def leave(self, row: Row) -> None:
        """End a row's answer before its next token."""
        row.finished = True

    def step(self) -> list[tuple[Row, int]]:
        """Decide the next token, a word or an invoke, of every row that is not finished."""
        self._feed()
        if not self.rows:
            return []
        asked = self._asked()
        self._decided, logprobs = self.executor.choose(asked)
        for row in self.rows:
            row.spare -= 1
        going = [at for at, row in enumerate(self.rows) if not row.finished]
        for at in going:
            self._record(self.rows[at], self._decided[at], logprobs[at], bool(asked.forced[at] != NONE))
        return [(self.rows[at], self._decided[at]) for at in going]

    def _feed(self, tidy: bool = False) -> None:
        """Append what was decided, and insert memories behind the invoke tokens.

        Finished rows go before, once they are half or one has no room left, and with `tidy` where there are any: to
        move the others costs more than to decode a few in vain.
        """
        going = [at for at, row in enumerate(self.rows) if not row.finished]
        full = any(row.spare < 0 for row in self.rows)
        if len(going) < len(self.rows) and (tidy or full or len(going) <= len(self.rows) // 2):
            self.executor.keep(going)
            self.rows = [self.rows[at] for at in going]
            self._decided = [self._decided[at] for at in going] if self._decided else []
        tokens, self._decided = self._decided, []
        if not tokens:
            return
        self.executor.append(tokens)
        for kind in KINDS:
            if rows := [at for at, token in enumerate(tokens) if self.executor.kinds.get(token) is kind]:
                self._remember(kind, rows)

    def _remember(self, kind: MemoryKind, places: list[int]) -> None:
        """Insert a memory and its end token behind the invoke token of the rows at `places`."""
        rows = [self.rows[at] for at in places]
        memory = self.executor.form(kind, places)
        for policy, seed, own in _by_policy(rows, range(len(rows))):
            memory[own] = policy.latents(memory[own], _view([rows[at] for at in own]), seed)
        self.executor.insert(kind, places, memory)
        for row in rows:
            row.insert([*[LATENT] * memory.shape[1], self.executor.ends[kind]])

    def _asked(self) -> Asked:
        rows = self.rows
        barred, forced = np.ones((len(rows), 2), bool), np.full(len(rows), NONE)
        for policy, seed, own in _by_policy(rows, [at for at, row in enumerate(rows) if row.may_invoke]):
            view = _view([rows[at] for at in own])
            barred[own], forced[own] = ~policy.allowed(view), policy.force(view, seed)
            if not self.executor.anywhere:
                barred[own] |= ~view.at_delimiter[:, None]
        temperature = np.array([row.request.temperature for row in rows])
        return Asked(
            temperature=np.where(temperature > COLDEST, temperature, 0.0),
            uniform=np.array([row.uniform[min(row.decisions, len(row.uniform) - 1)] for row in rows]),
            barred=barred,
            declines=np.array([row.request.policy.declines for row in rows]),
            standing=np.array([row.standing for row in rows]),
            forced=forced,
        )

    def _record(self, row: Row, token: int, logprob: float, forced: bool) -> None:
        kind = self.executor.kinds.get(token)
        if kind:
            forced = forced or row.standing != UNCHANGED  # then it may not be what the model asked for
            row.invocations.append(Invocation(len(row.tokens), kind, forced))
            row.tokens.append((token, not forced, 0.0 if forced else logprob))
        else:
            row.tokens.append((token, True, logprob))
            row.answer_length += 1
            row.finished = token in self.executor.stops or row.answer_length >= row.request.max_new_tokens
        row.decisions += 1
        row.at_delimiter = token in self.executor.delimiters
        row.remembering = kind is not None


def _by_policy(rows: Sequence[Row], places: Sequence[int]) -> list[tuple[InvocationPolicy, int, list[int]]]:
    """The places of rows, by the policy that decides for them and its seed."""
    found: dict[tuple[int, int], tuple[InvocationPolicy, int, list[int]]] = {}
    for at in places:
        request = rows[at].request
        found.setdefault((id(request.policy), request.seed), (request.policy, request.seed, []))[2].append(at)
    return list(found.values())


def _view(rows: Sequence[Row]) -> StepView:
    return StepView(
        keys=tuple(row.key for row in rows),
        decision=np.array([row.decisions for row in rows]),
        at_delimiter=np.array([row.at_delimiter for row in rows]),
    )
