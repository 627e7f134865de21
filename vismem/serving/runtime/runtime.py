"""Decodes answers with latent memory from an exported bundle: the serving twin of generation/engine.py.

Invocation is the model's own choice (paper Sec. 3.2); formation runs in the vision, builder and decoder graphs
(Sec. 3.3).
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .bundle import Bundle
from .images import Patches, cut_patches, grid_of
from .limits import RequestError
from .prompt import Prompt, TextStream, tokenise

Floats = NDArray[np.float32]
Kind = Literal["short", "long"]
KINDS: tuple[Kind, Kind] = ("short", "long")


@dataclass(frozen=True)
class Chunk:
    """One piece of an answer. An "end" chunk comes last; `text` may be empty."""

    text: str
    event: Literal["token", "short", "long", "end"]
    token: int | None = None  # the id behind it: a word, or an invoke token
    memory: Floats | None = None  # (N, d) the vectors that a "short" or "long" event inserted


class Runtime:
    """A bundle, ready to answer. One object may serve several threads at once."""

    def __init__(
        self, bundle: Path | str, threads: int = 1, verified: bool = False, max_patches: int | None = None
    ) -> None:
        """Open `bundle` with `threads` threads per answer. Raises BundleError if it is missing or damaged.

        `verified`: the caller has just verified or written the bundle; its files are not hashed again. `max_patches`:
        limit of a request's image patches after resizing; None: no limit.
        """
        self.bundle = Bundle(Path(bundle), threads, verified)
        self.max_patches = max_patches

    def generate(
        self,
        images: Sequence[Image.Image],
        prompt: str,
        *,
        max_new_tokens: int = 48,
        temperature: float = 0.0,
        seed: int = 0,
        memory: bool = True,
        force: Mapping[int, Kind] | None = None,
    ) -> Iterator[Chunk]:
        """Yield the answer's chunks; closing the iterator ends the work at once.

        `max_new_tokens` counts words, not memories; `temperature` 0 is greedy; `memory` False bars the model from
        invoking; `force` maps a decision's number (from 0) to a memory to insert there instead of sampling, for tests
        and parity. Raises RequestError for an unusable request, before the first chunk.
        """
        if not images:
            raise RequestError("no image: send at least one with the question")
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
        answer = Answer(self.bundle, images, prompt, max_new_tokens, self.max_patches)
        return answer.run(max_new_tokens, Sampler(temperature, seed), memory, force or {})


class Sampler:
    """Greedy, or draws by inverse transform, the same as the training engine's for a sample without an id."""

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature = temperature
        self.random = np.random.default_rng((seed, zlib.crc32(b"#0"), zlib.crc32(b"sample")))

    def __call__(self, logits: Floats) -> int:
        """The chosen column of (V,) scores; barred ones are -inf."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits / np.float32(self.temperature)
        cumulative = np.exp((scaled - scaled.max()).astype(np.float64)).cumsum()
        place = np.searchsorted(cumulative, self.random.random() * cumulative[-1], side="right")
        return min(int(place), len(logits) - 1)


class Answer:
    """One answer in the making: everything fed so far, with its embeddings, hidden states, positions, keys, values."""

    def __init__(
        self,
        bundle: Bundle,
        images: Sequence[Image.Image],
        question: str,
        max_new_tokens: int,
        max_patches: int | None = None,
    ) -> None:
        self.bundle, settings = bundle, bundle.settings
        self.settings, self.memory_settings, self.tokens = settings, settings["memory"], settings["tokens"]
        grids = [grid_of(image.size, settings["image"], f"image {i + 1}") for i, image in enumerate(images)]
        patches = sum(rows * columns for rows, columns in grids)
        if max_patches is not None and patches > max_patches:
            raise RequestError(f"the images make {patches} patches: the limit is {max_patches}; send fewer or smaller")
        self.prompt: Prompt = tokenise(bundle.tokenizer, settings, question, grids)
        self.limit = int(self.memory_settings["max_per_answer"])
        longest = max(self.memory_settings[f"{kind}_length"] for kind in KINDS)
        room = max_new_tokens + self.limit * (longest + 2)
        if self.prompt.next_position + room > settings["decoder"]["max_positions"]:
            raise RequestError(
                f"the question, its images and {max_new_tokens} tokens need {self.prompt.next_position + room} "
                f"positions, the model has {settings['decoder']['max_positions']}: send less, or ask for less"
            )
        self.patches: Patches = cut_patches(images, settings["image"])
        capacity = len(self.prompt.ids) + room
        self.embeddings: Floats = np.zeros((capacity, settings["width"]), np.float32)
        self.hidden: Floats = np.zeros((capacity, settings["width"]), np.float32)
        self.positions: Floats = np.zeros((3, capacity), np.float32)
        self.used = 0
        self.short_stream: dict[str, Any] | None = None
        decoder = settings["decoder"]
        self.nothing: Floats = np.zeros((1, decoder["kv_heads"], 0, decoder["head_width"]), np.float32)
        self.past = dict.fromkeys((name for name in bundle.decoder.inputs if name.startswith("past_")), self.nothing)

    def run(self, max_new_tokens: int, sampler: Sampler, memory: bool, force: Mapping[int, Kind]) -> Iterator[Chunk]:
        """Prefill, then decide, feed and form until the answer stops."""
        logits = self._prefill()
        segment, text = self.used, TextStream(self.bundle.tokenizer)
        vocabulary = logits.shape[0] - 2
        words = invoked = decision = 0
        remembering = False  # a memory was inserted, and no word has followed it yet
        while True:
            logits[[t for t in (*self.tokens["invoke"], *self.tokens["end"]) if t < vocabulary]] = -np.inf
            if not memory or remembering or invoked >= self.limit:
                logits[vocabulary:] = -np.inf
            column = sampler(logits)
            if decision in force and not remembering and invoked < self.limit:
                column = vocabulary + KINDS.index(force[decision])
            decision += 1
            if column >= vocabulary:
                index, invoked = column - vocabulary, invoked + 1
                self._feed(self._embed([self.tokens["invoke"][index]]))
                vectors = self._form(KINDS[index], segment)
                logits = self._feed(np.concatenate([vectors, self._embed([self.tokens["end"][index]])]))
                segment, remembering = self.used, True
                yield Chunk("", KINDS[index], self.tokens["invoke"][index], vectors)
                continue
            words, remembering = words + 1, False
            stopped = column in self.tokens["stop"]
            yield Chunk(text.add(column), "token", column)
            if stopped or words >= max_new_tokens:
                break
            logits = self._feed(self._embed([column]))
        yield Chunk(text.finish(), "end")

    # --- the language model ---

    def _prefill(self) -> Floats:
        embeddings = self._embed(self.prompt.ids)
        embeddings[self.prompt.visual] = self._see(0.0)["features"]
        return self._feed(embeddings, self.prompt.positions)

    def _embed(self, ids: Sequence[int] | NDArray[np.int64]) -> Floats:
        """(n, d); the four memory tokens have rows of their own."""
        table, own = self.bundle.embedding, [*self.tokens["invoke"], *self.tokens["end"]]
        rows: Floats = np.array(table[np.minimum(ids, len(table) - 1)], np.float32)
        for place, token in enumerate(own):
            rows[np.asarray(ids) == token] = self.bundle.memory_rows[place]
        return rows

    def _feed(self, embeddings: Floats, positions: NDArray[Any] | None = None) -> Floats:
        """Append (n, d) to the stream; returns the scores (V + 2,) after the last of them."""
        here = slice(self.used, self.used + len(embeddings))
        self.positions[:, here] = self._next_positions(len(embeddings)) if positions is None else positions
        self.embeddings[here] = embeddings
        self.used = here.stop
        out = self._decode(self.embeddings[here], self.positions[:, here], self.used, 0.0, self.past)
        self.past = {f"past_{name[8:]}": value for name, value in out.items() if name.startswith("present_")}
        self.hidden[here] = out["hidden"][0]
        scores: Floats = out["logits"][0]
        return scores

    def _next_positions(self, count: int) -> Floats:
        """(3, count): those that follow the stream's, the same on all axes."""
        following = self.positions[:, : self.used].max() + 1
        return np.broadcast_to(following + np.arange(count, dtype=np.float32), (3, count))

    def _decode(
        self, embeddings: Floats, positions: Floats, total: int, adapter: float, past: Mapping[str, Floats]
    ) -> dict[str, Floats]:
        """The decoder over new embeddings (n, d) at positions (3, n); `total` counts them and those in `past`."""
        return self.bundle.decoder(
            embeddings=embeddings[None],
            mask=np.ones((1, total), np.float32),
            positions=np.ascontiguousarray(positions[:, None]),
            adapter=np.array([adapter], np.float32),
            **past,
        )

    # --- memories ---

    def _form(self, kind: Kind, segment: int) -> Floats:
        """(N, d): from the visual hidden states and those of the answer since position `segment` (Eq. 5, 9-11)."""
        visual = self.hidden[: len(self.prompt.ids)][self.prompt.visual]
        built = self.bundle.builder(state=np.concatenate([visual, self.hidden[segment : self.used]]))
        memory: Floats = self._short(built["queries"]) if kind == "short" else self._long(built["long_tokens"])
        return memory

    def _long(self, tokens: Floats) -> Floats:
        """The whole stream and the tokens through the language model, its LoRA on."""
        length = self.memory_settings["long_length"]
        if self.memory_settings["pool_images"]:  # M_init stands on pooled image tokens, and so does the memory
            seen = self.embeddings[: len(self.prompt.ids)][self.prompt.visual]
            tokens[-length:] += shares(length, len(seen)) @ seen
        sequence = np.concatenate([self.embeddings[: self.used], tokens])
        positions = np.concatenate([self.positions[:, : self.used], self._next_positions(len(tokens))], axis=1)
        nothing = dict.fromkeys(self.past, self.nothing)
        memory: Floats = self._decode(sequence, positions, len(sequence), 1.0, nothing)["memory"][0]
        return memory + tokens[-length:] if self.memory_settings["pool_images"] else memory

    def _short(self, queries: Floats) -> Floats:
        """Queries and memory tokens beside the patches in the vision encoder, its LoRA on."""
        if self.short_stream is None:  # the patches with the adapter on: once per answer
            self.short_stream = self._see(1.0)
            self.short_stream["pooled"], places = self._pool(self.short_stream["patch_embeds"])
            identity = np.zeros((self.memory_settings["queries"], 2), np.float32)
            self.short_stream["positions"] = np.concatenate([identity, places])
        memory: Floats = self.bundle.short(queries=queries, **self.short_stream)["memory"]
        return memory

    def _see(self, adapter: float) -> dict[str, Any]:
        patches = self.patches
        return self.bundle.vision(
            pixels=patches.values,
            positions=patches.positions.astype(np.float32),
            windows=patches.window_ids,
            images=patches.image_ids,
            adapter=np.array([adapter], np.float32),
        )

    def _pool(self, embeds: Floats) -> tuple[Floats, Floats]:
        """Mean patch embedding and position for each memory token: merged tokens shared out evenly, or copied."""
        slots, merge = self.memory_settings["short_length"], self.memory_settings["merge"]
        if not self.memory_settings["pool_patches"]:
            return np.zeros((slots * merge, embeds.shape[1]), np.float32), np.zeros((slots * merge, 2), np.float32)
        count = len(embeds) // merge
        weight = shares(slots, count)
        pooled = weight @ embeds.reshape(count, -1)
        places = weight @ self.patches.positions.astype(np.float32).reshape(count, -1)
        return pooled.reshape(slots * merge, -1), places.reshape(slots * merge, 2)


def shares(slots: int, count: int) -> Floats:
    """(slots, count) weights that share `count` tokens out evenly to slots, in order: means, or copies if too few."""
    token, slot = np.arange(count)[None], np.arange(slots)[:, None]
    share = token * slots // count == slot if count >= slots else slot * count // slots == token
    weight: Floats = share.astype(np.float32)
    weight /= weight.sum(1, keepdims=True)
    return weight
