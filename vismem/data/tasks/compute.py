"""Tasks whose answer takes several steps of thought over what the coarse view shows, none of which is written down."""

from functools import partial

from vismem.data.sample import Capability
from vismem.data.tasks.layouts import CELLS, COLOURS, NUMBERS, SHAPES, Puzzle, World, plural, times, walk
from vismem.data.tasks.register import task

_, _reasoning, _ = (partial(task, "compute", capability) for capability in Capability)


@_reasoning(
    "how many shapes are alone in their colour?",
    "count the shapes alone in their colour.",
    "how many shapes do you see alone in their colour?",
    "count all that are alone in their colour.",
)
def alone(world: World) -> Puzzle:
    """How many objects have a colour that no other has."""
    layout = world.layout()
    colours = [thing.colour for thing in layout]
    return Puzzle((layout,), (), str(sum(colours.count(colour) == 1 for colour in colours)), "", NUMBERS)


@_reasoning(
    "how many {} are not {}?",
    "count the {} that are not {}.",
    "how many {} do you see that are not {}?",
    "count all {} that are not {}.",
)
def differ(world: World) -> Puzzle | None:
    """How many objects of one shape do not have a colour."""
    layout = world.layout()
    shape, colour = world.rng.choice(SHAPES), world.rng.choice(list(COLOURS))
    number = sum(thing.shape == shape and thing.colour != colour for thing in layout)
    if number == 0 and world.rng.random() < 0.7:
        return None
    return Puzzle((layout,), (plural(shape), colour), str(number), "", NUMBERS)


@_reasoning(
    "start at the {}, {}. where is it?",
    "from the {}, {}. where is it?",
    "start at the {}, {}. in which place is it?",
    "with the {} at the start, {}. where is it?",
)
def link(world: World) -> Puzzle | None:
    """Where a chain ends that goes on to the one other object of the same colour, then of the same shape, and so on."""
    layout = world.layout()
    start = here = world.rng.choice(layout)
    kinds = ["colour", "shape"] if world.kind() == "colour" else ["shape", "colour"]
    kinds = (kinds * 2)[: world.rng.randint(1, 3)]
    for kind in kinds:
        others = [thing for thing in layout if thing != here and getattr(thing, kind) == getattr(here, kind)]
        if len(others) != 1:
            return None
        here = others[0]
    if here == start or times(layout, start) > 1:
        return None
    steps = ", then ".join(f"go to the other of its {kind}" for kind in kinds)
    return Puzzle((layout,), (start.name, steps), here.place, "", CELLS)


@_reasoning(
    "go from the {}, {}. what is there?",
    "from the {}, go {}. what is there?",
    "go from the {}, {}. which shape do you see?",
    "which shape is there from the {}, {}?",
)
def route(world: World) -> Puzzle | None:
    """What stands at the end of a walk of two to four given steps."""
    length = world.rng.randint(2, 4)
    found = walk(world, length, world.number(minimum=length + 1))
    if not found:
        return None
    layout, path, moves = found
    if times(layout, path[0]) > 1:
        return None
    return Puzzle((layout,), (path[0].name, ", ".join(moves)), path[-1].name, "")
