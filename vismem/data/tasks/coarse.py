"""Tasks that a coarse view answers: what stands where, how many, and what follows from it.

The rationale reads the evidence off the image in short clauses, so that a long text stands between the image and the
answer.
"""

from dataclasses import replace
from functools import partial
from itertools import product

from vismem.data.sample import Capability
from vismem.data.tasks.layouts import (
    CELLS,
    COLOURS,
    COLUMNS,
    MOVES,
    NUMBERS,
    ROWS,
    SHAPES,
    VALUES,
    Pair,
    Puzzle,
    World,
    line_of,
    names_of,
    plural,
    tally,
    times,
    walk,
    without,
)
from vismem.data.tasks.register import task

_understanding, _reasoning, _generation = (partial(task, "coarse", capability) for capability in Capability)


@_understanding(
    "how many {} are there?",
    "count the {}.",
    "in this picture, how many {} are there?",
    "count the {} in this picture.",
)
def count(world: World) -> Puzzle:
    """How many objects of one colour or shape."""
    kind = world.kind()
    value = world.rng.choice(VALUES[kind])
    wanted = world.rng.randint(0, 4)
    number = world.number(minimum=max(wanted, 1))
    pairs = world.draw(wanted, kind, (value,)) + world.draw(number - wanted, kind, without(kind, value))
    layout = world.place(pairs)
    return Puzzle((layout,), (plural(value),), str(wanted), tally(value, layout), NUMBERS)


@_understanding(
    "where is the {}?", "in which place is the {}?", "where in this picture is the {}?", "the {} is in which place?"
)
def ground(world: World) -> Puzzle | None:
    """In which cell a named object is; another object has its colour."""
    layout = world.layout()
    target = world.rng.choice(layout)
    alike = [thing for thing in layout if thing.colour == target.colour]
    if times(layout, target) > 1 or (len(alike) == 1 and world.rng.random() < 0.7):
        return None
    seen = ", ".join(f"{thing.shape} at {thing.place}" for thing in alike)
    return Puzzle((layout,), (target.name,), target.place, f"{target.colour}: {seen}", CELLS)


@_understanding(
    "what is at the {}?", "what do you see at the {}?", "which shape is at the {}?", "at the {}, what do you see?"
)
def retrieve(world: World) -> Puzzle:
    """Colour and shape of what stands in a named cell; the rationale reads the cell's row."""
    layout = world.layout()
    target = world.rng.choice(layout)
    row = target.cell // 3
    seen = line_of(layout, range(3 * row, 3 * row + 3))
    return Puzzle((layout,), (target.place,), target.name, f"{ROWS[row]} row: {', '.join(seen)}")


@_understanding(
    "which shape is in both pictures?",
    "what is in both pictures?",
    "what do you see in both pictures?",
    "in both pictures there is which shape?",
)
def match(world: World) -> Puzzle:
    """Two images: which object is in both."""
    number = max(2, world.number() // 2 + 1)
    pairs = world.rng.sample(list(product(COLOURS, SHAPES)), 2 * number - 1)
    first, second = world.place(pairs[:number]), world.place(pairs[number - 1 :])
    rationale = f"first: {names_of(first)}; second: {names_of(second)}"
    return Puzzle((first, second), (), " ".join(pairs[number - 1]), rationale)


@_understanding(
    "what place changed?",
    "which place changed from the first to the second picture?",
    "the second picture changed in which place?",
    "from the first picture to the second, which place changed?",
)
def change(world: World) -> Puzzle | None:
    """Two images that differ in one object: in which cell. The rationale compares cell by cell up to the change."""
    first = world.layout(maximum=5)
    index = world.rng.randrange(len(first))
    old = first[index]
    kind = "colour" if world.rng.random() < 0.5 else "shape"
    colour, shape = world.draw(1, kind, (getattr(old, kind),))[0]
    new = replace(old, colour=colour, shape=shape)
    if new == old:
        return None
    second = (*first[:index], new, *first[index + 1 :])
    steps = [f"{a.place} {a.name}, {b.name}" for a, b in zip(first[: index + 1], second, strict=False)]
    return Puzzle((first, second), (), old.place, "; ".join(steps), CELLS)


@_reasoning(
    "how many more {} than {} are there?",
    "there are how many more {} than {}?",
    "in this picture, how many more {} than {} are there?",
    "count how many more {} than {} there are.",
)
def compare(world: World) -> Puzzle:
    """How many more objects of one colour or shape than of another."""
    kind = world.kind()
    more, fewer = world.rng.sample(VALUES[kind], 2)
    difference = world.rng.randint(0, 3)
    minimum = 0 if difference else 1
    less = world.rng.randint(minimum, max(minimum, min(2, 4 - difference, (world.max_objects - difference) // 2)))
    named = 2 * less + difference
    number = max(world.number(), named)
    pairs = world.draw(less + difference, kind, (more,)) + world.draw(less, kind, (fewer,))
    layout = world.place(pairs + world.draw(number - named, kind, without(kind, more, fewer)))
    rationale = f"{tally(more, layout)}; {tally(fewer, layout)}"
    return Puzzle((layout,), (plural(more), plural(fewer)), str(difference), rationale, NUMBERS[:4])


@_reasoning(
    "start at the {0}, {1}. what is there?",
    "what is {2} the {0}?",
    "start at the {0}, {1}. which shape do you see?",
    "which shape is {2} the {0}?",
)
def chain(world: World) -> Puzzle | None:
    """Where a walk of two or three steps from a named object ends."""
    length = world.rng.randint(2, 3)
    found = walk(world, length, world.number(minimum=length + 1))
    if not found:
        return None
    layout, (start, *stops), moves = found
    if times(layout, start) > 1:
        return None
    steps_text = ", then ".join(f"go {move}" for move in moves)
    nested = " the shape ".join(MOVES[move][0] for move in reversed(moves))
    steps = [f"{move} to {thing.name} at {thing.place}" for move, thing in zip(moves, stops, strict=True)]
    return Puzzle(
        (layout,),
        (start.name, steps_text, nested),
        stops[-1].name,
        "; ".join([f"{start.name} at {start.place}", *steps]),
    )


@_reasoning(
    "which shape is the odd one out?",
    "what is the odd one out?",
    "in the picture, which is odd?",
    "in this picture, which is the odd one out?",
)
def odd(world: World) -> Puzzle | None:
    """The one object whose colour (or shape) the others, which all agree in it, do not have."""
    kind = world.kind()
    common = world.rng.choice(VALUES[kind])
    number = world.number(minimum=4, maximum=7)
    pairs = world.draw(1, kind, without(kind, common)) + world.draw(number - 1, kind, (common,))
    other = [pair[1 if kind == "colour" else 0] for pair in pairs]
    if max(other.count(value) for value in other) >= number - 1:
        return None
    layout = world.place(pairs)
    return Puzzle((layout,), (), " ".join(pairs[0]), f"{names_of(layout)}; all {common} but one")


@_reasoning(
    "which shape completes the pattern at the {}?",
    "what completes the pattern at the {}?",
    "in the pattern, what is at the {}?",
    "at the {}, which shape completes the pattern?",
)
def pattern(world: World) -> Puzzle | None:
    """Rows share one attribute and columns the other: what belongs into an empty cell."""
    colours, shapes = world.rng.sample(VALUES["colour"], 3), world.rng.sample(SHAPES, 3)
    across = world.rng.random() < 0.5  # colours run along rows
    grid = [(colours[c // 3], shapes[c % 3]) if across else (colours[c % 3], shapes[c // 3]) for c in range(9)]
    hole = world.rng.randrange(9)
    empty = {hole, *world.rng.sample(range(9), world.rng.randint(0, 2))}
    layout = tuple(world.thing(cell, grid[cell]) for cell in range(9) if cell not in empty)
    row = [thing for thing in layout if thing.cell // 3 == hole // 3]
    column = [thing for thing in layout if thing.cell % 3 == hole % 3]
    if not row or not column:
        return None
    rationale = f"{ROWS[hole // 3]} row: {names_of(row)}; {COLUMNS[hole % 3]} column: {names_of(column)}"
    return Puzzle((layout,), (CELLS[hole],), " ".join(grid[hole]), rationale)


@_generation(
    "describe the {}.", "what do you see in the {}?", "describe what is in the {}.", "in the {}, what do you see?"
)
def describe_line(world: World) -> Puzzle | None:
    """An ordered description of one row or column; empty cells are called empty."""
    layout = world.layout()
    index = world.rng.randrange(3)
    if world.rng.random() < 0.5:
        line, cells = f"{ROWS[index]} row", range(3 * index, 3 * index + 3)
    else:
        line, cells = f"{COLUMNS[index]} column", range(index, 9, 3)
    seen = line_of(layout, cells)
    number = 3 - seen.count("empty")
    return Puzzle((layout,), (line,), ", ".join(seen), f"{line}: {number} of 3") if number else None


@_generation(
    "describe the picture.",
    "describe all shapes in this picture.",
    "describe what you see in this picture.",
    "what are all the shapes in this picture?",
)
def describe_scene(world: World) -> Puzzle:
    """Every object in reading order; the rationale gives how many each row has."""
    layout = world.layout(maximum=world.max_objects - 1)
    rows = [f"{name} row: {sum(thing.cell // 3 == row for thing in layout)}" for row, name in enumerate(ROWS)]
    return Puzzle((layout,), (), names_of(layout), "; ".join(rows))


@_generation("is there a {}?", "do you see a {}?", "in this picture, is there a {}?", "is a {} in the picture?")
def exists(world: World) -> Puzzle:
    """Yes or no: is an object there? Where it is not, its colour and its shape are, bound to other objects."""
    wanted = world.rng.random() < 0.5
    layout, options = world.layout(), set[Pair]()
    while not options:
        layout = world.layout()
        there = {(thing.colour, thing.shape) for thing in layout}
        crossed = {(colour, shape) for colour, _ in there for _, shape in there}
        options = there if wanted else crossed - there
    colour, shape = world.rng.choice(sorted(options))
    rationale = f"{colour}: {names_of(thing for thing in layout if thing.colour == colour)}"
    return Puzzle((layout,), (f"{colour} {shape}",), "yes" if wanted else "no", rationale, ("yes", "no"))


@_generation(
    "what colour is the {}?",
    "which colour is the {}?",
    "the {} is of what colour?",
    "in this picture, what colour is the {}?",
)
def presuppose(world: World) -> Puzzle:
    """The colour of a named shape, or "none" in two fifths, where the question presupposes what is not there."""
    wanted = 0 if world.rng.random() < 0.4 else 1
    while True:
        layout, shape = world.layout(), world.rng.choice(SHAPES)
        found = [thing.colour for thing in layout if thing.shape == shape]
        if len(found) == wanted:
            return Puzzle((layout,), (shape,), (found or ["none"])[0], tally(shape, layout), (*COLOURS, "none"))
