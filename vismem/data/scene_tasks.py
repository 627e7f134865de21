"""The questions about generated scenes: one builder a task, in the paper's three capabilities (its Table 1).

A builder draws a layout for which its question is well posed, or returns None and is asked again. The rationale reads
the evidence off the image in short clauses, so that a long text stands between the image and the answer. Of a task's
wordings the last two are kept from the pretrain split (`World.form`).
"""

import random
from collections.abc import Callable, Iterable

from vismem.data.sample import Capability
from vismem.data.scenes import CELLS, COLOURS, COLUMNS, ROWS, SHAPES, Layout, Puzzle, Thing, World

Builder = Callable[[random.Random, World], Puzzle | None]
Pair = tuple[str, str]

NUMBERS = tuple(str(number) for number in range(len(CELLS) + 1))
MOVES = {"up": -3, "down": 3, "left": -1, "right": 1}
SIDES = {"up": "above", "down": "below", "left": "left of", "right": "right of"}


def plural(noun: str) -> str:
    """The plural of a shape's name."""
    return noun + ("es" if noun.endswith("s") else "s")


def count(rng: random.Random, world: World) -> Puzzle:
    """How many objects of one colour or shape."""
    kind = rng.choice(("colour", "shape"))
    value = rng.choice(_values(kind))
    wanted = rng.randint(0, 4)
    number = world.number(rng, least=max(wanted, 1))
    pairs = [_pair(rng, world, **_only(kind, value)) for _ in range(wanted)]
    pairs += [_pair(rng, world, **_without(kind, value)) for _ in range(number - wanted)]
    layout = _place(rng, pairs)
    what = plural(value) if kind == "shape" else f"{value} shapes"
    forms = (
        "how many {} are there?",
        "count the {}.",
        "in this picture, how many {} are there?",
        "count the {} in this picture.",
    )
    return Puzzle((layout,), world.form(rng, forms).format(what), str(wanted), f"{_names(layout)}.", NUMBERS)


def ground(rng: random.Random, world: World) -> Puzzle | None:
    """In which cell a named object is; another object has its colour."""
    layout = _random_layout(rng, world)
    target = rng.choice(layout)
    alike = [thing for thing in layout if thing.colour == target.colour]
    if _times(layout, target) > 1 or (len(alike) == 1 and rng.random() < 0.7):
        return None
    forms = (
        "where is the {}?",
        "in which place is the {}?",
        "where in this picture is the {}?",
        "the {} is in which place?",
    )
    seen = ", ".join(f"{thing.shape} at {thing.place}" for thing in alike)
    rationale = f"{target.colour}: {seen}."
    return Puzzle((layout,), world.form(rng, forms).format(target.name), target.place, rationale, CELLS)


def retrieve(rng: random.Random, world: World) -> Puzzle:
    """Colour and shape of what stands in a named cell; the rationale reads the cell's row."""
    layout = _random_layout(rng, world)
    target = rng.choice(layout)
    row = ROWS[target.cell // 3]
    forms = (
        "what is at the {}?",
        "what do you see at the {}?",
        "which shape is at the {}?",
        "at the {}, what do you see?",
    )
    line = ", ".join(_or_empty(thing) for thing in _line(layout, range(target.cell // 3 * 3, target.cell // 3 * 3 + 3)))
    return Puzzle((layout,), world.form(rng, forms).format(target.place), target.name, f"{row} row: {line}.")


def match(rng: random.Random, world: World) -> Puzzle:
    """Two images: which object is in both."""
    number = max(2, world.number(rng) // 2 + 1)
    pairs = rng.sample(sorted(world.pairs), 2 * number - 1)
    first, second = _place(rng, pairs[:number]), _place(rng, pairs[number - 1 :])
    shared = " ".join(pairs[number - 1])
    forms = (
        "which shape is in both pictures?",
        "what is in both pictures?",
        "what do you see in both pictures?",
        "in both pictures there is which shape?",
    )
    rationale = f"first: {_names(first)}; second: {_names(second)}."
    return Puzzle((first, second), world.form(rng, forms), shared, rationale)


def change(rng: random.Random, world: World) -> Puzzle | None:
    """Two images that differ in one object: in which cell. The rationale compares cell by cell up to the change."""
    first = _random_layout(rng, world, most=5)
    index = rng.randrange(len(first))
    old = first[index]
    keep = _only("colour", old.colour) if rng.random() < 0.5 else _only("shape", old.shape)
    colour, shape = _pair(rng, world, **keep)
    new = Thing(old.cell, colour, shape)
    if new == old:
        return None
    second = (*first[:index], new, *first[index + 1 :])
    forms = (
        "what place changed?",
        "which place changed from the first to the second picture?",
        "the second picture changed in which place?",
        "from the first picture to the second, which place changed?",
    )
    steps = [f"{a.place} {a.name}, {b.name}" for a, b in zip(first[: index + 1], second, strict=False)]
    return Puzzle((first, second), world.form(rng, forms), old.place, "; ".join(steps) + ".", CELLS)


def compare(rng: random.Random, world: World) -> Puzzle:
    """How many more objects of one colour or shape than of another."""
    kind = rng.choice(("colour", "shape"))
    more, fewer = rng.sample(_values(kind), 2)
    difference = rng.randint(0, 3)
    least = 0 if difference else 1
    less = rng.randint(least, max(least, min(2, 4 - difference, (world.most - difference) // 2)))
    counts = (less + difference, less)
    number = max(world.number(rng), sum(counts))
    pairs = [_pair(rng, world, **_only(kind, more)) for _ in range(counts[0])]
    pairs += [_pair(rng, world, **_only(kind, fewer)) for _ in range(counts[1])]
    pairs += [_pair(rng, world, **_without(kind, more, fewer)) for _ in range(number - sum(counts))]
    layout = _place(rng, pairs)
    totals = "; ".join(f"{value}: {total}" for value, total in zip((more, fewer), counts, strict=True))
    names = [plural(value) if kind == "shape" else f"{value} shapes" for value in (more, fewer)]
    forms = (
        "how many more {} than {} are there?",
        "there are how many more {} than {}?",
        "in this picture, how many more {} than {} are there?",
        "count how many more {} than {} there are.",
    )
    return Puzzle(
        (layout,), world.form(rng, forms).format(*names), str(difference), f"{_names(layout)}; {totals}.", NUMBERS[:4]
    )


def chain(rng: random.Random, world: World) -> Puzzle | None:
    """Where a walk of two or three steps from a named object ends."""
    length = rng.randint(2, 3) if world.hard else 2
    cells, moves = [rng.randrange(9)], list[str]()
    while len(moves) < length:
        steps = [(move, cells[-1] + MOVES[move]) for move in MOVES if _inside(cells[-1], move)]
        move, cell = rng.choice([step for step in steps if step[1] not in cells] or steps)
        if cell in cells:
            return None
        moves.append(move)
        cells.append(cell)
    number = world.number(rng, least=length + 1)
    rest = rng.sample([cell for cell in range(9) if cell not in cells], number - length - 1)
    layout = tuple(sorted(Thing(cell, *_pair(rng, world)) for cell in cells + rest))
    by_cell = {thing.cell: thing for thing in layout}
    walk = [by_cell[cell] for cell in cells]
    if _times(layout, walk[0]) > 1:
        return None
    steps_text = ", then ".join(f"go {move}" for move in moves)
    nested = " the shape ".join(SIDES[move] for move in reversed(moves))
    forms = (
        "start at the {0}, {1}. what is there?",
        "what is {2} the {0}?",
        "start at the {0}, {1}. which shape do you see?",
        "which shape is {2} the {0}?",
    )
    stops = [f"{walk[0].name} at {walk[0].place}"]
    stops += [f"{move} to {thing.name} at {thing.place}" for move, thing in zip(moves, walk[1:], strict=True)]
    question = world.form(rng, forms).format(walk[0].name, steps_text, nested)
    return Puzzle((layout,), question, walk[-1].name, "; ".join(stops) + ".")


def odd(rng: random.Random, world: World) -> Puzzle | None:
    """The one object whose colour (or shape) the others, which all agree in it, do not have."""
    kind = rng.choice(("colour", "shape"))
    common = rng.choice(_values(kind))
    number = world.number(rng, least=4, most=7)
    pairs = [_pair(rng, world, **_without(kind, common))]
    pairs += [_pair(rng, world, **_only(kind, common)) for _ in range(number - 1)]
    other = [pair[1 if kind == "colour" else 0] for pair in pairs]
    if max(other.count(value) for value in other) >= number - 1:
        return None
    layout = _place(rng, pairs)
    forms = (
        "which shape is the odd one out?",
        "what is the odd one out?",
        "in the picture, which is odd?",
        "in this picture, which is the odd one out?",
    )
    rationale = f"{_names(layout)}; all {common} but one."
    return Puzzle((layout,), world.form(rng, forms), " ".join(pairs[0]), rationale)


def pattern(rng: random.Random, world: World) -> Puzzle | None:
    """Rows share one attribute and columns the other: what belongs into an empty cell."""
    colours, shapes = rng.sample(tuple(COLOURS), 3), rng.sample(SHAPES, 3)
    across = rng.random() < 0.5  # colours run along rows
    grid = [(colours[c // 3], shapes[c % 3]) if across else (colours[c % 3], shapes[c // 3]) for c in range(9)]
    hole = rng.randrange(9)
    empty = {hole, *rng.sample(range(9), rng.randint(1, 2) if world.hard else 0)}
    layout = tuple(Thing(cell, *grid[cell]) for cell in range(9) if cell not in empty)
    row = [thing for thing in layout if thing.cell // 3 == hole // 3]
    column = [thing for thing in layout if thing.cell % 3 == hole % 3]
    if not row or not column or any((thing.colour, thing.shape) not in world.pairs for thing in layout):
        return None
    forms = (
        "which shape completes the pattern at the {}?",
        "what completes the pattern at the {}?",
        "in the pattern, what is at the {}?",
        "at the {}, which shape completes the pattern?",
    )
    rationale = f"{ROWS[hole // 3]} row: {_names(row)}; {COLUMNS[hole % 3]} column: {_names(column)}."
    return Puzzle((layout,), world.form(rng, forms).format(CELLS[hole]), " ".join(grid[hole]), rationale)


def describe_line(rng: random.Random, world: World) -> Puzzle | None:
    """An ordered description of one row or column; empty cells are called empty."""
    layout = _random_layout(rng, world)
    index = rng.randrange(3)
    if rng.random() < 0.5:
        line, cells = f"{ROWS[index]} row", range(3 * index, 3 * index + 3)
    else:
        line, cells = f"{COLUMNS[index]} column", range(index, 9, 3)
    things = _line(layout, cells)
    number = sum(thing is not None for thing in things)
    if number == 0:
        return None
    forms = (
        "describe the {}.",
        "what do you see in the {}?",
        "describe what is in the {}.",
        "in the {}, what do you see?",
    )
    answer = ", ".join(_or_empty(thing) for thing in things)
    return Puzzle((layout,), world.form(rng, forms).format(line), answer, f"{line}: {number} of 3.")


def describe_scene(rng: random.Random, world: World) -> Puzzle:
    """Every object in reading order; the rationale gives how many each row has."""
    layout = _random_layout(rng, world, most=world.most - 1)
    forms = (
        "describe the picture.",
        "describe all shapes in this picture.",
        "describe what you see in this picture.",
        "what are all the shapes in this picture?",
    )
    rows = "; ".join(f"{name} row: {sum(thing.cell // 3 == row for thing in layout)}" for row, name in enumerate(ROWS))
    return Puzzle((layout,), world.form(rng, forms), _names(layout), f"{rows}.")


def exists(rng: random.Random, world: World) -> Puzzle:
    """Yes or no: is an object there? Where it is not, its colour and its shape are, bound to other objects."""
    wanted = rng.random() < 0.5
    layout, options = _random_layout(rng, world), set[Pair]()
    while not options:
        layout = _random_layout(rng, world)
        there = {(thing.colour, thing.shape) for thing in layout}
        crossed = {(colour, shape) for colour, _ in there for _, shape in there} & world.pairs
        options = there if wanted else crossed - there
    colour, shape = rng.choice(sorted(options))
    forms = (
        "is there a {}?",
        "do you see a {}?",
        "in this picture, is there a {}?",
        "is a {} in the picture?",
    )
    question = world.form(rng, forms).format(f"{colour} {shape}")
    return Puzzle((layout,), question, "yes" if wanted else "no", f"{_names(layout)}.", ("yes", "no"))


def presuppose(rng: random.Random, world: World) -> Puzzle:
    """The colour of a named shape, or "none" in two fifths, where the question presupposes what is not there."""
    wanted = 0 if rng.random() < 0.4 else 1
    shape, found = "", [Thing(0, "", "")] * 2
    while len(found) != wanted:
        layout, shape = _random_layout(rng, world), rng.choice(SHAPES)
        found = [thing for thing in layout if thing.shape == shape]
    forms = (
        "what colour is the {}?",
        "which colour is the {}?",
        "the {} is of what colour?",
        "in this picture, what colour is the {}?",
    )
    answer = found[0].colour if found else "none"
    return Puzzle((layout,), world.form(rng, forms).format(shape), answer, f"{_names(layout)}.", (*COLOURS, "none"))


BUILDERS: dict[str, Builder] = {
    "count": count,
    "ground": ground,
    "retrieve": retrieve,
    "match": match,
    "change": change,
    "compare": compare,
    "chain": chain,
    "odd": odd,
    "pattern": pattern,
    "describe_line": describe_line,
    "describe_scene": describe_scene,
    "exists": exists,
    "presuppose": presuppose,
}
TASKS: dict[str, Capability] = {
    **dict.fromkeys(("count", "ground", "retrieve", "match", "change"), Capability.UNDERSTANDING),
    **dict.fromkeys(("compare", "chain", "odd", "pattern"), Capability.REASONING),
    **dict.fromkeys(("describe_line", "describe_scene", "exists", "presuppose"), Capability.GENERATION),
}


# --- drawing layouts -------------------------------------------------------------------------------------------------


def _values(kind: str) -> tuple[str, ...]:
    return {"colour": tuple(COLOURS), "shape": SHAPES}[kind]


def _only(kind: str, value: str) -> dict[str, tuple[str, ...]]:
    return {f"{kind}s": (value,)}


def _without(kind: str, *values: str) -> dict[str, tuple[str, ...]]:
    return {f"{kind}s": tuple(value for value in _values(kind) if value not in values)}


def _pair(
    rng: random.Random, world: World, colours: tuple[str, ...] = tuple(COLOURS), shapes: tuple[str, ...] = SHAPES
) -> Pair:
    while (pair := (rng.choice(colours), rng.choice(shapes))) not in world.pairs:
        pass
    return pair


def _place(rng: random.Random, pairs: list[Pair]) -> Layout:
    """Put the pairs into random cells."""
    cells = rng.sample(range(9), len(pairs))
    return tuple(sorted(Thing(cell, *pair) for cell, pair in zip(cells, pairs, strict=True)))


def _random_layout(rng: random.Random, world: World, most: int = 9) -> Layout:
    return _place(rng, [_pair(rng, world) for _ in range(world.number(rng, most=most))])


def _inside(cell: int, move: str) -> bool:
    row, column = divmod(cell, 3)
    return {"up": row > 0, "down": row < 2, "left": column > 0, "right": column < 2}[move]


def _times(layout: Layout, thing: Thing) -> int:
    return sum(other.name == thing.name for other in layout)


# --- wording ---------------------------------------------------------------------------------------------------------


def _names(things: Iterable[Thing]) -> str:
    return ", ".join(thing.name for thing in things)


def _or_empty(thing: Thing | None) -> str:
    return thing.name if thing else "empty"


def _line(layout: Layout, cells: range) -> list[Thing | None]:
    by_cell = {thing.cell: thing for thing in layout}
    return [by_cell.get(cell) for cell in cells]
