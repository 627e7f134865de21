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
from .images import coarse_grid, cut_patches, decoded, grid_of, resized
from .limits import NEW_TOKENS, RequestError
from .prompt import TextStream, tokenise

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
        limit of a request's image patches after resizing, whole and coarse ones together; None: no limit.
        """
        self.bundle = Bundle(Path(bundle), threads, verified)
        self.max_patches = max_patches

    def generate(
        self,
        images: Sequence[Image.Image],
        prompt: str,
        *,
        max_new_tokens: int = NEW_TOKENS,
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
        return Answer(self, images, prompt, max_new_tokens).run(temperature, seed, memory, force or {})


class Answer:
    """One answer in the making: everything fed so far, with its embeddings, hidden states, positions, keys, values."""

    def __init__(self, runtime: Runtime, images: Sequence[Image.Image], question: str, max_new_tokens: int) -> None:
        bundle, settings, max_patches = runtime.bundle, runtime.bundle.settings, runtime.max_patches
        self.memory_settings, self.tokens, decoder = settings["memory"], settings["tokens"], settings["decoder"]
        seen = settings["image"]
        grids = shown = [grid_of(image.size, seen, f"image {i + 1}") for i, image in enumerate(images)]
        if (pixels := seen.get("prompt_pixels")) is not None:  # bundles from before there was a maximum lack it
            shown = [coarse_grid(grid, pixels, seen["patch_size"], seen["merge_size"]) for grid in grids]
        patches = sum(rows * columns for rows, columns in (grids if shown == grids else [*grids, *shown]))
        if max_patches is not None and patches > max_patches:
            raise RequestError(f"the images make {patches} patches: the limit is {max_patches}; send fewer or smaller")
        self.bundle, self.max_new_tokens = bundle, max_new_tokens
        self.prompt = tokenise(bundle.tokenizer, settings, question, shown)
        longest = max(self.memory_settings[f"{kind}_length"] for kind in KINDS)
        room = max_new_tokens + self.memory_settings["max_per_answer"] * (longest + 2)
        if (needed := int(self.prompt.positions.max()) + 1 + room) > decoder["max_positions"]:
            raise RequestError(
                f"the question, its images and {max_new_tokens} tokens need {needed} positions, "
                f"the model has {decoder['max_positions']}: send less, or ask for less"
            )
        whole = decoded(images)
        if seen["do_resize"]:
            whole = resized(whole, grids, seen)
        self.patches = self.shown = cut_patches(whole, grids, seen)  # of the whole images, and of those in the prompt
        if shown != grids:
            self.shown = cut_patches(resized(whole, shown, seen), shown, seen)
        capacity = len(self.prompt.ids) + room
        self.embeddings: Floats = np.zeros((capacity, settings["width"]), np.float32)
        self.hidden = np.zeros_like(self.embeddings)
        self.positions: Floats = np.zeros((3, capacity), np.float32)
        self.used = 0
        self.short_stream: dict[str, NDArray[Any]] = {}
        nothing: Floats = np.zeros((1, decoder["kv_heads"], 0, decoder["head_width"]), np.float32)
        self.past = self.no_past = {name: nothing for name in bundle.decoder.inputs if name.startswith("past_")}

    def run(self, temperature: float, seed: int, memory: bool, force: Mapping[int, Kind]) -> Iterator[Chunk]:
        """Prefill, then decide, feed and form until the answer stops."""
        random = np.random.default_rng((seed, zlib.crc32(b"#0"), zlib.crc32(b"sample")))  # the training engine's
        text = TextStream(self.bundle.tokenizer)
        embeddings = self._embed(self.prompt.ids)
        embeddings[self.prompt.visual] = self._see(self.shown, 0.0)["features"]
        logits = self._feed(embeddings, self.prompt.positions)
        segment, vocabulary = self.used, len(logits) - 2
        own = [token for token in (*self.tokens["invoke"], *self.tokens["end"]) if token < vocabulary]
        words = invoked = decision = 0
        remembering = False  # a memory was inserted, and no word has followed it yet
        while True:
            may_invoke = not remembering and invoked < self.memory_settings["max_per_answer"]
            logits[own] = -np.inf
            if not (memory and may_invoke):
                logits[vocabulary:] = -np.inf
            column = sample(logits, temperature, random)
            if may_invoke and decision in force:
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
            yield Chunk(text.add(column), "token", column)
            if column in self.tokens["stop"] or words >= self.max_new_tokens:
                break
            logits = self._feed(self._embed([column]))
        yield Chunk(text.finish(), "end")

    # --- the language model ---

    def _embed(self, ids: Sequence[int] | NDArray[np.int64]) -> Floats:
        """(n, d); the four memory tokens have rows of their own."""
        table = self.bundle.embedding
        rows: Floats = np.array(table[np.minimum(ids, len(table) - 1)], np.float32)
        for place, token in enumerate((*self.tokens["invoke"], *self.tokens["end"])):
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
        said = self.hidden[segment : self.used]
        built = self.bundle.builder(state=np.concatenate([visual, said]))
        return self._short(built["queries"], said) if kind == "short" else self._long(built["long_tokens"])

    def _long(self, tokens: Floats) -> Floats:
        """The whole stream and the tokens through the language model, its LoRA on."""
        length, pool = self.memory_settings["long_length"], self.memory_settings["pool_images"]
        if pool:  # M_init stands on pooled image tokens, and so does the memory
            seen = self.embeddings[: len(self.prompt.ids)][self.prompt.visual]
            tokens[-length:] += shares(length, len(seen)) @ seen
        sequence = np.concatenate([self.embeddings[: self.used], tokens])
        positions = np.concatenate([self.positions[:, : self.used], self._next_positions(len(tokens))], axis=1)
        memory: Floats = self._decode(sequence, positions, len(sequence), 1.0, self.no_past)["memory"][0]
        return memory + tokens[-length:] if pool else memory

    def _short(self, queries: Floats, segment: Floats) -> Floats:
        """Queries and memory tokens beside the whole images' patches in the vision encoder, its LoRA on."""
        if not self.short_stream:  # the patches with the adapter on: once per answer
            self.short_stream = self._see(self.patches, 1.0) | {"positions": self.patches["positions"]}
        inputs = {"queries": queries, "segment": segment, **self.short_stream}
        if not self.memory_settings["look"]:  # M_init stands alone, at the identity position
            for name in ("segment", "positions", "features", "patch_embeds"):
                del inputs[name]
        return self.bundle.short(**inputs)["memory"]

    def _see(self, patches: Mapping[str, NDArray[Any]], adapter: float) -> dict[str, NDArray[Any]]:
        return self.bundle.vision(**patches, adapter=np.array([adapter], np.float32))


def sample(logits: Floats, temperature: float, random: np.random.Generator) -> int:
    """A column of (V,) scores, barred ones -inf: the best at temperature 0, else drawn by inverse transform."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits / np.float32(temperature)
    cumulative = np.exp((scaled - scaled.max()).astype(np.float64)).cumsum()
    place = np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
    return min(int(place), len(logits) - 1)


def shares(slots: int, count: int) -> Floats:
    """(slots, count) weights that share `count` tokens out evenly to slots, in order: means, or copies if too few."""
    token, slot = np.arange(count)[None], np.arange(slots)[:, None]
    share = token * slots // count == slot if count >= slots else slot * count // slots == token
    weight: Floats = share.astype(np.float32)
    weight /= weight.sum(1, keepdims=True)
    return weight
