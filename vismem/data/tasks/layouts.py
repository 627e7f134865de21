"""What scenes are made of: colours and shapes in the cells of a 3x3 grid, and what each split may show.

The layout (what stands in which cell) decides by its hash to which split an image may belong, so that no image of one
split can appear in another. Below that, what the tasks share: drawing layouts that hold or lack colours and shapes, and
naming what stands in them.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 220),
    "yellow": (240, 205, 40),
    "purple": (135, 50, 175),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
VALUES: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "shape": SHAPES}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
CELLS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
NUMBERS = tuple(str(number) for number in range(len(CELLS) + 1))
SPLITS = ("pretrain", "train", "validation", "test")

# Colour-shape pairs that the pretrain split never shows; the last two are shown by the test split only.
HELD_OUT = (
    ("green", "circle"),
    ("purple", "square"),
    ("red", "triangle"),
    ("black", "star"),
    ("yellow", "circle"),
    ("blue", "cross"),
)
TEST_ONLY = HELD_OUT[-2:]


@dataclass(frozen=True, order=True)
class Thing:
    """One object. `cell` counts from 0 (top left) to 8 (bottom right) in reading order."""

    cell: int
    colour: str
    shape: str

    @property
    def place(self) -> str:
        """The cell's name, such as "top left"."""
        return CELLS[self.cell]

    @property
    def name(self) -> str:
        """Colour and shape, such as "red circle"."""
        return f"{self.colour} {self.shape}"


Pair = tuple[str, str]  # a colour and a shape
Layout = tuple[Thing, ...]  # one image, in reading order


@dataclass(frozen=True)
class World:
    """What the scenes of one split may hold, and the random choices among that."""

    split: str
    min_objects: int
    max_objects: int
    pairs: frozenset[Pair]
    rng: random.Random = field(default_factory=random.Random)

    @property
    def hard(self) -> bool:
        """Every split but pretrain."""
        return self.split != "pretrain"

    def owns(self, layout: Layout) -> bool:
        """Whether this split may show the layout; exactly one split may."""
        text = "|".join(f"{t.cell},{t.colour},{t.shape}" for t in layout)
        return SPLITS[hashlib.sha256(text.encode()).digest()[0] % len(SPLITS)] == self.split

    def form(self, forms: Sequence[str]) -> str:
        """One wording. The last is for a tenth of the test split, the one before it for all splits but pretrain."""
        if self.split == "test" and self.rng.random() < 0.1:
            return forms[-1]
        return self.rng.choice(forms[:-1] if self.hard else forms[:-2])

    def kind(self) -> str:
        """By what objects are told apart."""
        return self.rng.choice(("colour", "shape"))

    def number(self, minimum: int = 1, maximum: int = 9) -> int:
        """A number of objects within the split's range and the task's own bounds."""
        low = max(self.min_objects, minimum)
        return self.rng.randint(low, max(low, min(self.max_objects, maximum)))

    def draw(self, number: int, kind: str = "colour", values: Sequence[str] = VALUES["colour"]) -> list[Pair]:
        """Colour-shape pairs that the split may show, whose colour (or shape: `kind`) is one of `values`."""
        allowed = {**VALUES, kind: values}
        pairs: list[Pair] = []
        while len(pairs) < number:
            pair = (self.rng.choice(allowed["colour"]), self.rng.choice(allowed["shape"]))
            if pair in self.pairs:
                pairs.append(pair)
        return pairs

    def place(self, pairs: Sequence[Pair]) -> Layout:
        """Put the pairs into random cells."""
        cells = self.rng.sample(range(9), len(pairs))
        return tuple(sorted(Thing(cell, *pair) for cell, pair in zip(cells, pairs, strict=True)))

    def layout(self, maximum: int = 9) -> Layout:
        """Any pairs in any cells, at most `maximum`."""
        return self.place(self.draw(self.number(maximum=maximum)))


@dataclass(frozen=True)
class Puzzle:
    """A question with its layouts and its answer. `blanks` are what its wording is filled with."""

    layouts: tuple[Layout, ...]
    blanks: tuple[str, ...]
    answer: str
    rationale: str
    choices: tuple[str, ...] = ()
    question: str = ""


def without(kind: str, *values: str) -> tuple[str, ...]:
    """The other colours, or shapes."""
    return tuple(value for value in VALUES[kind] if value not in values)


def plural(value: str) -> str:
    """What objects of one colour or shape are called, such as "red shapes" or "crosses"."""
    return f"{value} shapes" if value in COLOURS else value + ("es" if value.endswith("s") else "s")


def times(layout: Layout, thing: Thing) -> int:
    """How many objects of the layout have this one's colour and shape."""
    return sum(other.name == thing.name for other in layout)


def names_of(things: Iterable[Thing]) -> str:
    """The objects' names, joined by commas."""
    return ", ".join(thing.name for thing in things)


def line_of(layout: Layout, cells: Iterable[int]) -> list[str]:
    """What stands in each of the cells: an object's name, or "empty"."""
    names = {thing.cell: thing.name for thing in layout}
    return [names.get(cell, "empty") for cell in cells]


def tally(value: str, layout: Layout) -> str:
    """The objects of one colour or shape, counted aloud: "red: 1 red circle, 2 red star", or "red: none"."""
    found = [thing.name for thing in layout if value in (thing.colour, thing.shape)]
    return f"{value}: " + (", ".join(f"{number} {name}" for number, name in enumerate(found, 1)) or "none")
