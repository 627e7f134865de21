"""The tasks of understanding: what is where, how many, and what two images share."""

import random

from vismem.data.tasks.layouts import (
    CELLS,
    NUMBERS,
    ROWS,
    Builder,
    Puzzle,
    Thing,
    World,
    draw_pair,
    line_of,
    name_or_empty,
    names_of,
    only,
    place,
    plural,
    random_layout,
    tally,
    times,
    values_of,
    without,
)


def count(rng: random.Random, world: World) -> Puzzle:
    """How many objects of one colour or shape."""
    kind = rng.choice(("colour", "shape"))
    value = rng.choice(values_of(kind))
    wanted = rng.randint(0, 4)
    number = world.number(rng, minimum=max(wanted, 1))
    pairs = [draw_pair(rng, world, **only(kind, value)) for _ in range(wanted)]
    pairs += [draw_pair(rng, world, **without(kind, value)) for _ in range(number - wanted)]
    layout = place(rng, pairs)
    what = plural(value) if kind == "shape" else f"{value} shapes"
    forms = (
        "how many {} are there?",
        "count the {}.",
        "in this picture, how many {} are there?",
        "count the {} in this picture.",
    )
    rationale = f"{tally(value, kind, layout)}."
    return Puzzle((layout,), world.form(rng, forms).format(what), str(wanted), rationale, NUMBERS)


def ground(rng: random.Random, world: World) -> Puzzle | None:
    """In which cell a named object is; another object has its colour."""
    layout = random_layout(rng, world)
    target = rng.choice(layout)
    alike = [thing for thing in layout if thing.colour == target.colour]
    if times(layout, target) > 1 or (len(alike) == 1 and rng.random() < 0.7):
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
    layout = random_layout(rng, world)
    target = rng.choice(layout)
    row = ROWS[target.cell // 3]
    forms = (
        "what is at the {}?",
        "what do you see at the {}?",
        "which shape is at the {}?",
        "at the {}, what do you see?",
    )
    line = ", ".join(
        name_or_empty(thing) for thing in line_of(layout, range(target.cell // 3 * 3, target.cell // 3 * 3 + 3))
    )
    return Puzzle((layout,), world.form(rng, forms).format(target.place), target.name, f"{row} row: {line}.")


def match(rng: random.Random, world: World) -> Puzzle:
    """Two images: which object is in both."""
    number = max(2, world.number(rng) // 2 + 1)
    pairs = rng.sample(sorted(world.pairs), 2 * number - 1)
    first, second = place(rng, pairs[:number]), place(rng, pairs[number - 1 :])
    shared = " ".join(pairs[number - 1])
    forms = (
        "which shape is in both pictures?",
        "what is in both pictures?",
        "what do you see in both pictures?",
        "in both pictures there is which shape?",
    )
    rationale = f"first: {names_of(first)}; second: {names_of(second)}."
    return Puzzle((first, second), world.form(rng, forms), shared, rationale)


def change(rng: random.Random, world: World) -> Puzzle | None:
    """Two images that differ in one object: in which cell. The rationale compares cell by cell up to the change."""
    first = random_layout(rng, world, maximum=5)
    index = rng.randrange(len(first))
    old = first[index]
    keep = only("colour", old.colour) if rng.random() < 0.5 else only("shape", old.shape)
    colour, shape = draw_pair(rng, world, **keep)
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


BUILDERS: dict[str, Builder] = {
    "count": count,
    "ground": ground,
    "retrieve": retrieve,
    "match": match,
    "change": change,
}
