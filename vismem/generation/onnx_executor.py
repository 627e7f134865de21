"""The executor over an exported bundle's ONNX graphs, for the CPU: what decodes where there is no torch.

Formation runs in the vision, short, builder and decoder graphs (paper Sec. 3.3), a row at a time; decoding in the
decoder graph, all rows together.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vismem.generation.invocation import MODES
from vismem.generation.loop import Asked, Prefilled, Request, greedy_columns
from vismem.generation.slots import Slots, room
from vismem.models.kinds import MemoryKind
from vismem.models.tokens import KINDS
from vismem.runtime.bundle import Bundle
from vismem.runtime.cache import ContentCache
from vismem.runtime.chat import Chat
from vismem.runtime.limits import MAX_PATCHES, Room
from vismem.runtime.question import Question, prepare

Floats = NDArray[np.float32]
STEP = 64  # slots by which the past grows


class OnnxExecutor:
    """See `vismem.generation.loop.Executor`."""

    slots: Slots
    questions: list[Question]  # of each row
    logits: list[Floats]  # (V + 2,) of each row's next token
    capacity: int  # slots that each row has
    past: dict[str, Floats]  # keys and values, (allocated rows, heads, capacity, head width) each
    embeddings: Floats  # (allocated rows, capacity, d); so are `hidden`, and `positions` (allocated rows, capacity, 3)
    hidden: Floats
    positions: Floats

    running = nullcontext
    modes = MODES

    def __init__(self, bundle: Bundle, max_patches: int | None = None, cache_bytes: int = 0) -> None:
        """`max_patches`: of the images after resizing, whole and coarse ones together, and prompt tokens; None: any.

        `cache_bytes`: of what is kept of images and prompts that may be asked again.
        """
        self.cache = ContentCache(cache_bytes)
        self.attending = Room(MAX_PATCHES**2)  # attention is dense: many long prompts at a time would not fit
        self.bundle, self.max_patches, settings = bundle, max_patches, bundle.settings
        self.tokenizer, self.new_tokens = bundle.tokenizer, bundle.new_tokens
        self.memory, self.tokens, self.decoder = settings["memory"], settings["tokens"], settings["decoder"]
        self.kinds = dict(zip(self.tokens["invoke"], KINDS, strict=True))
        self.ends = dict(zip(KINDS, self.tokens["end"], strict=True))
        self.own_rows = {token: at for at, token in enumerate((*self.kinds, *self.ends.values()))}  # of embeddings
        self.delimiters, self.stops = frozenset(self.tokens["delimiters"]), frozenset(self.tokens["stop"])
        self.anywhere = bool(self.memory["anywhere"])
        self.lengths = {kind: int(self.memory[f"{kind}_length"]) for kind in KINDS}
        nothing: Floats = np.zeros((1, self.decoder["kv_heads"], 0, self.decoder["head_width"]), np.float32)
        self.no_past = {name: nothing for name in bundle.decoder.inputs if name.startswith("past_")}
        self._empty()

    def limit(self, asked: int | None) -> int:
        own = int(self.memory["max_per_answer"])
        return own if asked is None else min(own, asked)

    def prepare(self, images: Sequence[Image.Image], chat: Chat, max_new_tokens: int) -> Question:
        """Decode and cut the images, and tokenise the prompt; no graph runs. RequestError for an unusable request."""
        most = room(max_new_tokens, self.limit(None), max(self.lengths.values()))
        return prepare(self.bundle, images, chat, most, self.max_patches)

    def read(self, question: Question, memory: bool) -> None:
        """Run the prompt through the graphs, and with `memory` the images through the short former's.

        Other threads than the one that decodes may do so before the question joins; no row changes.
        """
        with self.attending.of(max(len(question.prompt.ids), len(question.whole["pixels"])) ** 2):
            self._read(question, memory)

    def _read(self, question: Question, memory: bool) -> None:
        ids, positions = question.prompt.ids, question.prompt.positions
        seen = self.cache.get(("shown", question.seen), lambda: self._see(question.shown, 0.0)["features"], _bytes)
        embeddings = self._embed(ids)
        embeddings[question.prompt.visual] = seen
        key = "read", question.seen, ids.tobytes()
        question.read = self.cache.get(key, lambda: self._decode(embeddings, positions, 0.0), _bytes)
        question.embeddings = embeddings
        if memory:
            self._read_images(question)

    # --- loop.Executor ---

    def join(self, request: Request, limit: int) -> list[Prefilled]:
        """Prefill a request's rows, of which each has a question of its own. Where it raises, no row has changed."""
        for question in request.samples:
            if question.embeddings is None:
                self.read(question, memory=False)
        prompts = [question.prompt for question in request.samples]
        self._grow(len(self.questions) + len(prompts), max(len(prompt.ids) for prompt in prompts))
        for question in request.samples:
            length, row, out = len(question.prompt.ids), len(self.questions), question.read
            for name, held in self.past.items():
                held[row, :, :length] = out[f"present_{name[5:]}"][0]
            self.embeddings[row, :length], self.hidden[row, :length] = question.embeddings, out["hidden"][0]
            self.positions[row, :length] = question.prompt.positions.T
            self.logits.append(out["logits"][0])
            question.embeddings, question.read = None, {}  # the row has them
            self.slots.join([length], [int(question.prompt.positions.max()) + 1])
            self.questions.append(question)
        return [Prefilled(len(prompt.ids), int(prompt.visual.sum())) for prompt in prompts]

    def choose(self, asked: Asked) -> tuple[list[int], list[float]]:
        scores = np.stack(self.logits)
        count = scores.shape[1] - len(KINDS)
        scores[:, [token for token in self.own_rows if token < count]] = -np.inf
        scores[:, count:][asked.barred] = -np.inf
        scores /= np.where(asked.temperature > 0, asked.temperature, 1.0).astype(np.float32)[:, None]
        scores -= scores.max(1, keepdims=True)
        weights = np.exp(scores.astype(np.float64))
        totals = np.log(weights.sum(1))
        columns = np.where(asked.declines, scores[:, :count].argmax(1), greedy_columns(scores)).tolist()
        for row in np.flatnonzero(asked.temperature > 0):
            end = count if asked.declines[row] else scores.shape[1]
            columns[row] = _drawn(weights[row], end, asked.uniform[row])
        columns = asked.settled(columns, count)
        tokens = [column if column < count else self.tokens["invoke"][column - count] for column in columns]
        return tokens, (scores[np.arange(len(columns)), columns] - totals).tolist()

    def append(self, tokens: Sequence[int]) -> None:
        self._feed(self._embed(tokens)[:, None], range(len(tokens)))

    def form(self, kind: MemoryKind, rows: Sequence[int]) -> Floats:
        return np.stack([self._form(kind, row) for row in rows])

    def insert(self, kind: MemoryKind, rows: Sequence[int], memory: Floats) -> None:
        ends = self._embed([self.ends[kind]] * len(rows))[:, None]
        self._feed(np.concatenate([memory, ends], axis=1), rows)
        self.slots.open_segment(rows)

    def keep(self, rows: Sequence[int]) -> None:
        if not rows:  # nothing stays allocated
            return self._empty()
        self.slots.keep(rows)
        self.questions, self.logits = [self.questions[row] for row in rows], [self.logits[row] for row in rows]
        used = int(self.slots.used.max())
        if self.capacity > 2 * used + STEP:  # a longer row has left: the others need not read its slots for ever
            self.capacity = _whole_steps(used)
            for name, held in self.past.items():
                self.past[name] = held[:, :, : self.capacity].copy()
        arrays = (*self.past.values(), self.embeddings, self.hidden, self.positions)
        for place, row in enumerate(rows):  # a row moves forward, to where one is gone or has moved
            for held in arrays if row > place else ():
                held[place, ..., :used, :] = held[row, ..., :used, :]

    # --- the rows ---

    def _empty(self) -> None:
        self.slots, self.questions, self.logits, self.capacity = Slots(), [], [], 0
        self.past = {name: nothing[:0] for name, nothing in self.no_past.items()}
        self.embeddings = self.hidden = np.zeros((0, 0, self.bundle.settings["width"]), np.float32)
        self.positions = np.zeros((0, 0, 3), np.float32)

    def _grow(self, rows: int, used: int) -> None:
        """Have room for `rows` rows of `used` slots, and for the next: graphs read all of the past, where it lies."""
        capacity = max(self.capacity, _whole_steps(used))
        for name, held in self.past.items():
            self.past[name] = _grown(held, rows, capacity, slots=2)
        for name in ("embeddings", "hidden", "positions"):
            setattr(self, name, _grown(getattr(self, name), rows, capacity, slots=1))
        self.capacity = capacity  # last: where memory runs out, the rows go on with what they had

    def _feed(self, embeddings: Floats, rows: Sequence[int]) -> None:
        """Append (R, T, d) to `rows`."""
        count, added, _ = embeddings.shape
        slots, positions = self.slots.take(added, rows)
        if (used := int(slots.max()) + 1) > self.capacity:
            self._grow(len(self.questions), used)
        own, first, after = np.array(rows)[:, None], rows[0], rows[-1] + 1
        read = slice(first, after) if after - first == count else own[:, 0]  # where it lies, or a copy
        mask = np.concatenate([np.arange(self.capacity) < slots[:, :1], np.ones((count, added), bool)], axis=1)
        out = self.bundle.decoder(
            embeddings=embeddings,
            mask=mask.astype(np.float32),
            positions=np.broadcast_to(positions, (3, count, added)).astype(np.float32),
            adapter=np.zeros(count, np.float32),
            **{name: held[read, :, : self.capacity] for name, held in self.past.items()},
        )
        for name, held in self.past.items():
            held[own, :, slots] = out[f"present_{name[5:]}"].transpose(0, 2, 1, 3)
        self.embeddings[own, slots], self.hidden[own, slots] = embeddings, out["hidden"]
        self.positions[own, slots] = positions[..., None]
        for row, logits in zip(rows, out["logits"], strict=True):
            self.logits[row] = logits

    def _embed(self, ids: Sequence[int] | NDArray[np.int64]) -> Floats:
        """(n, d); the four memory tokens have rows of their own."""
        table = self.bundle.embedding
        rows: Floats = table[np.minimum(ids, len(table) - 1)]
        for at, token in enumerate(ids):
            if (own := self.own_rows.get(token)) is not None:
                rows[at] = self.bundle.memory_rows[own]
        return rows

    # --- memories ---

    def _form(self, kind: MemoryKind, row: int) -> Floats:
        """(N, d): from the visual hidden states and those of the answer's current segment."""
        question, used = self.questions[row], self.slots.used[row]
        visual = self.hidden[row, : len(question.prompt.ids)][question.prompt.visual]
        said = self.hidden[row, self.slots.segment[row] : used]
        built = self.bundle.builder(state=np.concatenate([visual, said]))
        if kind is MemoryKind.SHORT:
            return self._short(question, built["queries"], said)
        return self._long(row, built["long_tokens"])

    def _long(self, row: int, tokens: Floats) -> Floats:
        """The whole stream and the tokens through the language model, its LoRA on."""
        length, pool, used = self.lengths[MemoryKind.LONG], self.memory["pool_images"], self.slots.used[row]
        prompt, stream = self.questions[row].prompt, self.embeddings[row, :used]
        if pool:  # M_init stands on pooled image tokens, and so does the memory
            seen = stream[: len(prompt.ids)][prompt.visual]
            tokens[-length:] += shares(length, len(seen)) @ seen
        after = np.broadcast_to(self.slots.next[row] + np.arange(len(tokens)), (3, len(tokens)))
        positions = np.concatenate([self.positions[row, :used].T, after], axis=1)
        memory: Floats = self._decode(np.concatenate([stream, tokens]), positions, 1.0)["memory"][0]
        return memory + tokens[-length:] if pool else memory

    def _short(self, question: Question, queries: Floats, said: Floats) -> Floats:
        """Queries and memory tokens beside the whole images' patches in the vision encoder, its LoRA on."""
        self._read_images(question)
        positions = question.whole["positions"]
        return self.bundle.short(queries=queries, segment=said, positions=positions, **question.stream)["memory"]

    def _read_images(self, question: Question) -> None:
        """The whole images with the short former's adapter on: once per question."""
        key = "whole", question.seen
        question.stream = question.stream or self.cache.get(key, lambda: self._see(question.whole, 1.0), _bytes)

    def _see(self, patches: Mapping[str, NDArray[Any]], adapter: float) -> dict[str, NDArray[Any]]:
        return self.bundle.vision(**patches, adapter=np.array([adapter], np.float32))

    def _decode(self, embeddings: Floats, positions: NDArray[Any], adapter: float) -> dict[str, Floats]:
        """The decoder over a whole stream (n, d) at positions (3, n)."""
        return self.bundle.decoder(
            embeddings=embeddings[None],
            mask=np.ones((1, len(embeddings)), np.float32),
            positions=np.ascontiguousarray(positions[:, None], np.float32),
            adapter=np.array([adapter], np.float32),
            **self.no_past,
        )


def _whole_steps(slots: int) -> int:
    return -(-slots // STEP) * STEP


def _bytes(arrays: Floats | Mapping[str, Floats]) -> int:
    return sum(array.nbytes for array in arrays.values()) if isinstance(arrays, Mapping) else arrays.nbytes


def _drawn(weight: NDArray[np.float64], end: int, uniform: float) -> int:
    """A column of weights (V + 2,), drawn by a uniform number; one from `end` on is declined, and another drawn.

    The same number serves again, rescaled within the declined columns' share, in which it is uniform.
    """
    cumulative = weight.cumsum()
    at = uniform * cumulative[-1]
    if np.isnan(at):  # a word, as greedily: no memory
        return 0
    column = min(int(np.searchsorted(cumulative, at, side="right")), len(weight) - 1)
    if column >= end:
        kept = cumulative[end - 1]
        again = (at - kept) / (cumulative[-1] - kept) * kept
        column = min(int(np.searchsorted(cumulative[:end], again, side="right")), end - 1)
    return column


def shares(slots: int, count: int) -> Floats:
    """(slots, count) weights that share `count` tokens out evenly to slots, in order: means, or copies if too few."""
    token, slot = np.arange(count)[None], np.arange(slots)[:, None]
    share = token * slots // count == slot if count >= slots else slot * count // slots == token
    weight: Floats = share.astype(np.float32)
    weight /= weight.sum(1, keepdims=True)
    return weight


def _grown(held: Floats, rows: int, capacity: int, slots: int) -> Floats:
    """`held` with at least `rows` rows, along axis 0, and `capacity` slots, along axis `slots`; new ones are zero.

    Rows double, so that many which join one by one are not copied each time. What is never written takes no memory.
    """
    shape = [*held.shape]
    if shape[0] >= rows and shape[slots] >= capacity:
        return held
    shape[0], shape[slots] = shape[0] if shape[0] >= rows else max(rows, 2 * shape[0]), max(capacity, shape[slots])
    larger = np.zeros(shape, held.dtype)
    larger[tuple(map(slice, held.shape))] = held
    return larger
