"""The tasks of generation: descriptions, and probes that presuppose what is not there."""

import random

from vismem.data.tasks.layouts import (
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    Builder,
    Pair,
    Puzzle,
    Thing,
    World,
    line_of,
    name_or_empty,
    names_of,
    random_layout,
    tally,
)


def describe_line(rng: random.Random, world: World) -> Puzzle | None:
    """An ordered description of one row or column; empty cells are called empty."""
    layout = random_layout(rng, world)
    index = rng.randrange(3)
    if rng.random() < 0.5:
        line, cells = f"{ROWS[index]} row", range(3 * index, 3 * index + 3)
    else:
        line, cells = f"{COLUMNS[index]} column", range(index, 9, 3)
    things = line_of(layout, cells)
    number = sum(thing is not None for thing in things)
    if number == 0:
        return None
    forms = (
        "describe the {}.",
        "what do you see in the {}?",
        "describe what is in the {}.",
        "in the {}, what do you see?",
    )
    answer = ", ".join(name_or_empty(thing) for thing in things)
    return Puzzle((layout,), world.form(rng, forms).format(line), answer, f"{line}: {number} of 3.")


def describe_scene(rng: random.Random, world: World) -> Puzzle:
    """Every object in reading order; the rationale gives how many each row has."""
    layout = random_layout(rng, world, maximum=world.max_objects - 1)
    forms = (
        "describe the picture.",
        "describe all shapes in this picture.",
        "describe what you see in this picture.",
        "what are all the shapes in this picture?",
    )
    rows = "; ".join(f"{name} row: {sum(thing.cell // 3 == row for thing in layout)}" for row, name in enumerate(ROWS))
    return Puzzle((layout,), world.form(rng, forms), names_of(layout), f"{rows}.")


def exists(rng: random.Random, world: World) -> Puzzle:
    """Yes or no: is an object there? Where it is not, its colour and its shape are, bound to other objects."""
    wanted = rng.random() < 0.5
    layout, options = random_layout(rng, world), set[Pair]()
    while not options:
        layout = random_layout(rng, world)
        there = {(thing.colour, thing.shape) for thing in layout}
        crossed = {(colour, shape) for colour, _ in there for _, shape in there} & world.pairs
        options = there if wanted else crossed - there
    colour, shape = rng.choice(sorted(options))
    forms = ("is there a {}?", "do you see a {}?", "in this picture, is there a {}?", "is a {} in the picture?")
    question = world.form(rng, forms).format(f"{colour} {shape}")
    rationale = f"{colour}: {names_of(thing for thing in layout if thing.colour == colour)}."
    return Puzzle((layout,), question, "yes" if wanted else "no", rationale, ("yes", "no"))


def presuppose(rng: random.Random, world: World) -> Puzzle:
    """The colour of a named shape, or "none" in two fifths, where the question presupposes what is not there."""
    wanted = 0 if rng.random() < 0.4 else 1
    shape, found = "", [Thing(0, "", "")] * 2
    while len(found) != wanted:
        layout, shape = random_layout(rng, world), rng.choice(SHAPES)
        found = [thing for thing in layout if thing.shape == shape]
    forms = (
        "what colour is the {}?",
        "which colour is the {}?",
        "the {} is of what colour?",
        "in this picture, what colour is the {}?",
    )
    answer = found[0].colour if found else "none"
    rationale = f"{tally(shape, 'shape', layout)}."
    return Puzzle((layout,), world.form(rng, forms).format(shape), answer, rationale, (*COLOURS, "none"))


BUILDERS: dict[str, Builder] = {
    "describe_line": describe_line,
    "describe_scene": describe_scene,
    "exists": exists,
    "presuppose": presuppose,
}
