"""What scenes are made of: colours and shapes in the cells of a 3x3 grid, and what each split may show.

The layout (what stands in which cell) decides by its hash to which split an image may belong, so that no image of one
split can appear in another. Below that, what the tasks share: drawing layouts that hold or lack colours and shapes, and
naming what stands in them.
"""

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 220),
    "yellow": (240, 205, 40),
    "purple": (135, 50, 175),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
TEXTURES = ("plain", "lined", "barred", "checked")  # too fine for a coarse view
VALUES: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "shape": SHAPES}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
CELLS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
MOVES = {"up": ("above", -1, 0), "down": ("below", 1, 0), "left": ("left of", 0, -1), "right": ("right of", 0, 1)}
SIGNS = dict(zip(MOVES, TEXTURES, strict=True))  # the texture that says where to go
NUMBERS = tuple(str(number) for number in range(len(CELLS) + 1))
SPLITS = ("pretrain", "train", "validation", "test")


@dataclass(frozen=True, order=True)
class Thing:
    """One object. `cell` counts from 0 (top left) to 8 (bottom right) in reading order."""

    cell: int
    colour: str
    shape: str
    texture: str

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
    rng: random.Random = field(default_factory=random.Random)

    def owns(self, layout: Layout) -> bool:
        """Whether this split may show the layout; exactly one split may."""
        text = "|".join(f"{t.cell},{t.colour},{t.shape}" for t in layout)
        return SPLITS[hashlib.sha256(text.encode()).digest()[0] % len(SPLITS)] == self.split

    def kind(self) -> str:
        """By what objects are told apart."""
        return self.rng.choice(("colour", "shape"))

    def number(self, minimum: int = 1, maximum: int = 9) -> int:
        """A number of objects within the split's range and the task's own bounds."""
        low = max(self.min_objects, minimum)
        return self.rng.randint(low, max(low, min(self.max_objects, maximum)))

    def draw(self, number: int, kind: str = "colour", values: Sequence[str] = VALUES["colour"]) -> list[Pair]:
        """Colour-shape pairs whose colour (or shape: `kind`) is one of `values`."""
        allowed = {**VALUES, kind: values}
        return [(self.rng.choice(allowed["colour"]), self.rng.choice(allowed["shape"])) for _ in range(number)]

    def place(self, pairs: Sequence[Pair]) -> Layout:
        """Put the pairs into random cells."""
        cells = self.rng.sample(range(9), len(pairs))
        return tuple(sorted(self.thing(cell, pair) for cell, pair in zip(cells, pairs, strict=True)))

    def thing(self, cell: int, pair: Pair) -> Thing:
        """An object in this cell, of any texture."""
        return Thing(cell, *pair, self.rng.choice(TEXTURES))

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


def walk(
    world: World, length: int, number: int, signs: Mapping[str, str] | None = None
) -> tuple[Layout, list[Thing], list[str]] | None:
    """A layout of `number` objects, those on a walk of `length` steps between neighbours, and the steps.

    No cell is entered twice; None where the walk drawn has no way on. With `signs` each object that is left on the walk
    has the texture that stands for the step.
    """
    cells, moves = [world.rng.randrange(9)], list[str]()
    while len(moves) < length:
        row, column = divmod(cells[-1], 3)
        steps = [
            (move, 3 * (row + down) + column + right)
            for move, (_, down, right) in MOVES.items()
            if 0 <= row + down < 3 and 0 <= column + right < 3
        ]
        free = [step for step in steps if step[1] not in cells]
        if not free:
            return None
        move, cell = world.rng.choice(free)
        moves.append(move)
        cells.append(cell)
    taken = cells + world.rng.sample([cell for cell in range(9) if cell not in cells], number - length - 1)
    by_cell = {cell: world.thing(cell, pair) for cell, pair in zip(taken, world.draw(number), strict=True)}
    for cell, move in zip(cells, moves, strict=False):
        by_cell[cell] = replace(by_cell[cell], texture=signs[move]) if signs else by_cell[cell]
    return tuple(sorted(by_cell.values())), [by_cell[cell] for cell in cells], moves


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
