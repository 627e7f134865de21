"""Tasks that need the whole picture: textures are too fine for a coarse view of it.

In the longer ones an object's texture is a sign that says where to look next, so that no one look at the start can
know what will be asked for.
"""

from functools import partial

from vismem.data.sample import Capability
from vismem.data.tasks.layouts import NUMBERS, SIGNS, TEXTURES, Layout, Puzzle, Thing, World, times, walk
from vismem.data.tasks.register import task

WALKS = 100  # that are drawn for a length: of long ones, most have no way on before their end

_understanding, _reasoning, _ = (partial(task, "detail", capability) for capability in Capability)


@_understanding(
    "what texture is the {}?", "the texture of the {}?", "which texture does the {} have?", "of what texture is the {}?"
)
def texture(world: World) -> Puzzle | None:
    """The texture of a named object."""
    layout = world.layout()
    target = world.rng.choice(layout)
    if times(layout, target) > 1:
        return None
    return Puzzle((layout,), (target.name,), target.texture, f"{target.name} at {target.place}", TEXTURES)


@_understanding(
    "do the {} and the {} have the same texture?",
    "is the texture of the {} and the {} the same?",
    "is the {} like the {} in texture?",
    "have the {} and the {} one texture?",
)
def same(world: World) -> Puzzle | None:
    """Whether two named objects have one texture."""
    layout = world.layout()
    one, other = world.rng.sample(layout, 2) if len(layout) > 1 else (layout[0], layout[0])
    alike = one.texture == other.texture
    if one == other or max(times(layout, one), times(layout, other)) > 1:
        return None
    if not alike and world.rng.random() < 2 / 3:  # by chance three of four pairs are
        return None
    seen = "; ".join(f"{thing.name} at {thing.place}, {thing.texture}" for thing in (one, other))
    return Puzzle((layout,), (one.name, other.name), "yes" if alike else "no", seen, ("yes", "no"))


@_understanding(
    "which {} shape is {}?",
    "find the {} shape that is {}.",
    "which {} shape do you see {}?",
    "the {} shape that is {}?",
)
def pick(world: World) -> Puzzle | None:
    """Which object of a colour has a texture; the rationale looks at all of that colour."""
    layout = world.layout()
    target = world.rng.choice(layout)
    alike = [thing for thing in layout if thing.colour == target.colour]
    fitting = [thing for thing in alike if thing.texture == target.texture]
    if len(alike) < 2 or len(fitting) > 1 or times(layout, target) > 1:
        return None
    seen = [f"{t.name} at {t.place}, {t.texture}, {'yes' if t == target else 'no'}" for t in alike]
    return Puzzle((layout,), (target.colour, target.texture), target.name, "; ".join(seen))


@_understanding(
    "how many shapes are {}?", "count the {} shapes.", "how many {} shapes do you see?", "count the shapes that are {}."
)
def textured(world: World) -> Puzzle:
    """How many objects have a texture; the rationale goes through all and counts aloud."""
    layout = world.layout()
    value = world.rng.choice(TEXTURES)
    counted, seen = 0, []
    for thing in layout:
        counted += thing.texture == value
        seen.append(f"{thing.name} at {thing.place}, {thing.texture}, {counted}")
    return Puzzle((layout,), (value,), str(counted), "; ".join(seen), NUMBERS)


@_reasoning(
    "follow {1} signs from the {0}. what is there?",
    "start at the {0}, follow {1} signs. what is there?",
    "start at the {0}, follow {1} signs. which shape do you see?",
    "which shape is {1} signs from the {0}?",
)
def follow(world: World) -> Puzzle | None:
    """What stands at the end of a walk on which each object's texture is the sign for the next step."""
    found = _signed_walk(world)
    if not found:
        return None
    layout, path, said = found
    return Puzzle((layout,), (path[0].name, str(len(path) - 1)), path[-1].name, said)


@_reasoning(
    "follow {1} signs from the {0}. which colours are on the way?",
    "start at the {0}, follow {1} signs. which colours are on the way?",
    "start at the {0}, follow {1} signs. which colours do you see?",
    "which colours are on the way of {1} signs from the {0}?",
)
def tour(world: World) -> Puzzle | None:
    """The colours of all objects on such a walk, in order."""
    found = _signed_walk(world)
    if not found:
        return None
    layout, path, said = found
    colours = ", ".join(thing.colour for thing in path)
    return Puzzle((layout,), (path[0].name, str(len(path) - 1)), colours, said)


def _signed_walk(world: World) -> tuple[Layout, list[Thing], str] | None:
    """A full layout, the objects on a walk of five to seven signs, and the walk in words: 60 to 100 tokens.

    No cell is empty, so that where objects stand says little of the signs.
    """
    length = world.rng.randint(5, 7)
    drawn = (walk(world, length, number=9, signs=SIGNS) for _ in range(WALKS))
    found = next(filter(None, drawn), None)
    if not found or times(found[0], found[1][0]) > 1:
        return None
    layout, path, moves = found
    steps = [f"{t.name} at {t.place}, {t.texture}, {move}" for t, move in zip(path, moves, strict=False)]
    return layout, path, "; ".join([*steps, f"{path[-1].name} at {path[-1].place}"])
