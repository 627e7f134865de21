"""A question and its images to token ids and three-axis positions; token ids back to text, piece by piece."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from vismem.runtime.chat import IMAGE, Chat
from vismem.runtime.limits import RequestError
from vismem.runtime.reserved import Reserved

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt, one image token per merged patch."""

    ids: Integers  # (L,)
    positions: Integers  # (3, L): time, height, width
    visual: NDArray[np.bool_]  # (L,) True at image tokens


def tokenise(tokenizer: Tokenizer, settings: dict[str, Any], chat: Chat, grids: Sequence[tuple[int, int]]) -> Prompt:
    """The prompt of a conversation with images of `grids` patches. `settings` is runtime.json.

    RequestError for a text that holds one of the tokenizer's own tokens, and for turns that the base has no way to say.
    """
    Reserved(tokenizer).check(chat)
    parts, merge = settings["prompt"], settings["image"]["merge_size"]
    merged = [(rows // merge, columns // merge) for rows, columns in grids]
    images = (parts["image"].replace(parts["image_token"], parts["image_token"] * rows * n) for rows, n in merged)
    ids = np.array(tokenizer.encode(composed(parts["joints"], chat, images)).ids, np.int64)
    visual = ids == settings["tokens"]["image"]
    return Prompt(ids, _positions(visual, merged), visual)


def composed(joints: Mapping[str, str], chat: Chat, images: Iterable[str]) -> str:
    """The conversation as one text. `joints`: what the base's chat template puts between two turns, by their roles."""
    each, roles = iter(images), [turn.role for turn in chat]
    between = [f"{before} {after}" for before, after in pairwise(("start", *roles, "end"))]
    if not joints.keys() >= {*between}:
        raise RequestError(f"the base's chat template has no such turns: {', '.join(roles)}")
    texts = ["".join(next(each) if part is IMAGE else part for part in turn.parts) for turn in chat]
    return joints[between[0]] + "".join(text + joints[name] for text, name in zip(texts, between[1:], strict=True))


def _positions(visual: NDArray[np.bool_], grids: Sequence[tuple[int, int]]) -> Integers:
    """Text advances on all axes; an image has one time, and its rows and columns count from there."""
    positions = np.zeros((3, len(visual)), np.int64)
    place = following = 0  # tokens done, and the position that follows them
    for rows, columns in grids:
        start = place + int(np.argmax(visual[place:]))
        positions[:, place:start] = following + np.arange(start - place)
        following += start - place
        place = start + rows * columns
        row, column = np.divmod(np.arange(rows * columns), columns)
        positions[:, start:place] = following + np.stack([np.zeros_like(row), row, column])
        following += max(rows, columns)
    positions[:, place:] = following + np.arange(len(visual) - place)
    return positions


class TextStream:
    """Turns token ids into text as they come, up to the first stop string.

    A character of several tokens comes out whole; what may be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self.stop = [text for text in stop if text]
        self.ids: list[int] = []
        self.held, self.passed, self.stopped = "", "", False

    def add(self, token: int) -> str:
        """The text that is certain with this token, may be empty; `passed` has all of it. Special tokens give none."""
        self.ids.append(token)
        return self._pass(self.stream.step(self.tokenizer, token) or "", last=False)

    def finish(self) -> str:
        """What was held back, also of a character within which an answer ends."""
        if self.stopped:
            return ""
        text: str = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        return self._pass(text[len(self.passed) + len(self.held) :], last=True)

    def _pass(self, new: str, last: bool) -> str:
        text = self.held + new
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        sizes = ((stop, size) for stop in self.stop for size in range(1, min(len(stop), len(text) + 1)))
        begun = [size for stop, size in sizes if text.endswith(stop[:size])]
        self.stopped = bool(places)
        certain = min(places) if places else len(text) if last else len(text) - max(begun, default=0)
        self.held = text[certain:]
        self.passed += text[:certain]
        return text[:certain]
