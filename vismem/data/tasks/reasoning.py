"""The tasks of reasoning: differences, walks, odd ones out and rules over rows and columns."""

import random

from vismem.data.tasks.layouts import (
    CELLS,
    COLOURS,
    COLUMNS,
    NUMBERS,
    ROWS,
    SHAPES,
    Builder,
    Puzzle,
    Thing,
    World,
    draw_pair,
    names_of,
    only,
    place,
    plural,
    tally,
    times,
    values_of,
    without,
)

MOVES = {"up": -3, "down": 3, "left": -1, "right": 1}
SIDES = {"up": "above", "down": "below", "left": "left of", "right": "right of"}


def compare(rng: random.Random, world: World) -> Puzzle:
    """How many more objects of one colour or shape than of another."""
    kind = rng.choice(("colour", "shape"))
    more, fewer = rng.sample(values_of(kind), 2)
    difference = rng.randint(0, 3)
    minimum = 0 if difference else 1
    less = rng.randint(minimum, max(minimum, min(2, 4 - difference, (world.max_objects - difference) // 2)))
    counts = (less + difference, less)
    number = max(world.number(rng), sum(counts))
    pairs = [draw_pair(rng, world, **only(kind, more)) for _ in range(counts[0])]
    pairs += [draw_pair(rng, world, **only(kind, fewer)) for _ in range(counts[1])]
    pairs += [draw_pair(rng, world, **without(kind, more, fewer)) for _ in range(number - sum(counts))]
    layout = place(rng, pairs)
    rationale = "; ".join(tally(value, kind, layout) for value in (more, fewer)) + "."
    names = [plural(value) if kind == "shape" else f"{value} shapes" for value in (more, fewer)]
    forms = (
        "how many more {} than {} are there?",
        "there are how many more {} than {}?",
        "in this picture, how many more {} than {} are there?",
        "count how many more {} than {} there are.",
    )
    return Puzzle((layout,), world.form(rng, forms).format(*names), str(difference), rationale, NUMBERS[:4])


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
    number = world.number(rng, minimum=length + 1)
    rest = rng.sample([cell for cell in range(9) if cell not in cells], number - length - 1)
    layout = tuple(sorted(Thing(cell, *draw_pair(rng, world)) for cell in cells + rest))
    by_cell = {thing.cell: thing for thing in layout}
    walk = [by_cell[cell] for cell in cells]
    if times(layout, walk[0]) > 1:
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
    common = rng.choice(values_of(kind))
    number = world.number(rng, minimum=4, maximum=7)
    pairs = [draw_pair(rng, world, **without(kind, common))]
    pairs += [draw_pair(rng, world, **only(kind, common)) for _ in range(number - 1)]
    other = [pair[1 if kind == "colour" else 0] for pair in pairs]
    if max(other.count(value) for value in other) >= number - 1:
        return None
    layout = place(rng, pairs)
    forms = (
        "which shape is the odd one out?",
        "what is the odd one out?",
        "in the picture, which is odd?",
        "in this picture, which is the odd one out?",
    )
    rationale = f"{names_of(layout)}; all {common} but one."
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
    rationale = f"{ROWS[hole // 3]} row: {names_of(row)}; {COLUMNS[hole % 3]} column: {names_of(column)}."
    return Puzzle((layout,), world.form(rng, forms).format(CELLS[hole]), " ".join(grid[hole]), rationale)


def _inside(cell: int, move: str) -> bool:
    row, column = divmod(cell, 3)
    return {"up": row > 0, "down": row < 2, "left": column > 0, "right": column < 2}[move]


BUILDERS: dict[str, Builder] = {"compare": compare, "chain": chain, "odd": odd, "pattern": pattern}
