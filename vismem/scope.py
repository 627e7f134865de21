"""What a base was trained to read, where it says so: a small base answers anything else with nonsense.

A base says it in `scope.json` beside its weights; the recipe that trains it writes the file. Most bases have none.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vismem.files import read_json, write_json

FILE = "scope.json"
GROUND_TOLERANCE = 16  # levels per channel
LOOKED_AT = (48, 48)  # pixels of a picture
WORDS_SHOWN = 5  # unknown ones, in a message


@dataclass(frozen=True)
class Scope:
    """What a base reads."""

    name: str  # of the base, as in "the tiny VLM"
    pictures: str  # what they show
    ground: tuple[int, int, int]  # the colour of what stands behind all objects, red, green, blue
    ground_share: float  # of a picture's pixels that have it, at least
    sides: tuple[int, int]  # min and max side in pixels, after the processor's resizing
    square: bool  # whether all sides were equal then
    words: Collection[str]  # of its questions

    @classmethod
    def read(cls, base: Path) -> "Scope | None":
        """The scope of the base in this folder; None: it does not say."""
        return cls(**read_json(base / FILE)) if (base / FILE).is_file() else None

    def write(self, base: Path) -> None:
        """Write it beside the base's weights."""
        write_json(base / FILE, asdict(self))

    def doubts(self, images: Sequence[Image.Image], seen: Sequence[tuple[int, int]], question: str) -> Iterator[str]:
        """Why an answer would mean nothing, one line each; none where images and question are in scope.

        `seen` are the sizes of the images (width, height) after the base's processor has resized them.
        """
        trained = f"{self.name} was trained on {self.pictures}"
        low, high = self.sides
        for image, (width, height) in zip(images, seen, strict=True):
            fits = low <= min(width, height) <= max(width, height) <= high
            if not fits or (self.square and width != height):
                found = f"this {image.width} x {image.height} image is resized to {width} x {height}"
                sides = f"of {low} to {high} pixels per side{', square' if self.square else ''}"
                yield f"{trained}, {sides}; {found}: its answer means nothing"
            elif self._share_of_ground(image) < self.ground_share:
                yield f"{trained}; this {image.width} x {image.height} image is not one: its answer means nothing"
        if unknown := [word for word in dict.fromkeys(words_of(question)) if word not in self.words]:
            shown = ", ".join(f"'{word}'" for word in unknown[:WORDS_SHOWN])
            case = " lower-case" if any(word.lower() in self.words for word in unknown) else ""
            yield f"unknown words: {shown} ({self.name} knows {len(self.words)}{case} words): its answer means nothing"

    def _share_of_ground(self, image: Image.Image) -> float:
        pixels = np.asarray(image.convert("RGB").resize(LOOKED_AT, Image.Resampling.NEAREST), np.int64)
        return float((np.abs(pixels - self.ground) <= GROUND_TOLERANCE).all(-1).mean())


def words_of(text: str) -> list[str]:
    """The words of a question."""
    return re.findall(r"[^\W\d_]+", text)
