"""What scene tasks share: drawing layouts that hold or lack colours and shapes, and naming what stands in them."""

import random
from collections.abc import Callable, Iterable

from vismem.data.scenes import CELLS, COLOURS, SHAPES, Layout, Puzzle, Thing, World

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


def random_layout(rng: random.Random, world: World, most: int = 9) -> Layout:
    """Any pairs in any cells, at most `most`."""
    return place(rng, [draw_pair(rng, world) for _ in range(world.number(rng, most=most))])


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
