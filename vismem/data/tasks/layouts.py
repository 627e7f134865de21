"""What scenes are made of: colours and shapes in the cells of a 3x3 grid, and what each split may show.

The layout (what stands in which cell) decides by its hash to which split an image may belong, so that no image of one
split can appear in another. Below that, what the tasks share: drawing layouts that hold or lack colours and shapes, and
naming what stands in them.
"""

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 220),
    "yellow": (240, 205, 40),
    "purple": (135, 50, 175),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
CELLS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
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


Layout = tuple[Thing, ...]  # one image, in reading order


@dataclass(frozen=True)
class World:
    """What the scenes of one split may hold: the number of objects, the colour-shape pairs, the question forms."""

    split: str
    min_objects: int
    max_objects: int
    pairs: frozenset[tuple[str, str]]

    @property
    def hard(self) -> bool:
        """Every split but pretrain."""
        return self.split != "pretrain"

    def number(self, rng: random.Random, minimum: int = 1, maximum: int = 9) -> int:
        """A number of objects within the split's range and the task's own bounds."""
        low = max(self.min_objects, minimum)
        return rng.randint(low, max(low, min(self.max_objects, maximum)))

    def owns(self, layout: Layout) -> bool:
        """Whether this split may show the layout; exactly one split may."""
        text = "|".join(f"{t.cell},{t.colour},{t.shape}" for t in layout)
        return SPLITS[hashlib.sha256(text.encode()).digest()[0] % len(SPLITS)] == self.split

    def form(self, rng: random.Random, forms: tuple[str, ...]) -> str:
        """One wording. The last is for a tenth of the test split, the one before it for all splits but pretrain."""
        if self.split == "test" and rng.random() < 0.1:
            return forms[-1]
        return rng.choice(forms[:-1] if self.hard else forms[:-2])


@dataclass(frozen=True)
class Puzzle:
    """A question with its layouts and its answer."""

    layouts: tuple[Layout, ...]
    question: str
    answer: str
    rationale: str = ""
    choices: tuple[str, ...] = ()


Builder = Callable[[random.Random, World], Puzzle | None]
Pair = tuple[str, str]

NUMBERS = tuple(str(number) for number in range(len(CELLS) + 1))


def plural(noun: str) -> str:
    """The plural of a shape's name."""
    return noun + ("es" if noun.endswith("s") else "s")


def values_of(kind: str) -> tuple[str, ...]:
    """All colours, or all shapes."""
    return {"colour": tuple(COLOURS), "shape": SHAPES}[kind]


def only(kind: str, value: str) -> dict[str, tuple[str, ...]]:
    """`draw_pair`'s argument for pairs with this colour or shape."""
    return {f"{kind}s": (value,)}


def without(kind: str, *values: str) -> dict[str, tuple[str, ...]]:
    """`draw_pair`'s argument for pairs with none of these colours or shapes."""
    return {f"{kind}s": tuple(value for value in values_of(kind) if value not in values)}


def draw_pair(
    rng: random.Random, world: World, colours: tuple[str, ...] = tuple(COLOURS), shapes: tuple[str, ...] = SHAPES
) -> Pair:
    """A colour and a shape that the world may show together."""
    while (pair := (rng.choice(colours), rng.choice(shapes))) not in world.pairs:
        pass
    return pair


def place(rng: random.Random, pairs: list[Pair]) -> Layout:
    """Put the pairs into random cells."""
    cells = rng.sample(range(9), len(pairs))
    return tuple(sorted(Thing(cell, *pair) for cell, pair in zip(cells, pairs, strict=True)))


def random_layout(rng: random.Random, world: World, maximum: int = 9) -> Layout:
    """Any pairs in any cells, at most `maximum`."""
    return place(rng, [draw_pair(rng, world) for _ in range(world.number(rng, maximum=maximum))])


def times(layout: Layout, thing: Thing) -> int:
    """How many objects of the layout have this one's colour and shape."""
    return sum(other.name == thing.name for other in layout)


def names_of(things: Iterable[Thing]) -> str:
    """The objects' names, joined by commas."""
    return ", ".join(thing.name for thing in things)


def name_or_empty(thing: Thing | None) -> str:
    """The object's name, or "empty"."""
    return thing.name if thing else "empty"


def line_of(layout: Layout, cells: range) -> list[Thing | None]:
    """What stands in each of the cells; None for an empty one."""
    by_cell = {thing.cell: thing for thing in layout}
    return [by_cell.get(cell) for cell in cells]


def tally(value: str, kind: str, layout: Layout) -> str:
    """The objects of one colour or shape, counted aloud: "red: 1 red circle, 2 red star", or "red: none"."""
    found = [thing for thing in layout if value == getattr(thing, kind)]
    return f"{value}: " + (", ".join(f"{number} {thing.name}" for number, thing in enumerate(found, 1)) or "none")
