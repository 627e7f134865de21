"""Generated scenes: coloured shapes on a 3x3 grid, drawn with Pillow, with questions asked from the scene's own truth.

What a scene may hold is in `tasks.layouts`; the questions themselves are in the other files of `tasks`.
"""

import io
import json
import math
import random
from collections.abc import Iterator

from PIL import Image, ImageDraw

from vismem.config import ScenesSource
from vismem.data.sample import Sample
from vismem.data.tasks import BUILDERS, TASKS
from vismem.data.tasks.layouts import CELLS, COLOURS, HELD_OUT, SHAPES, TEST_ONLY, Layout, Thing, World
from vismem.errors import UserError

BACKGROUND = (245, 245, 240)
RADIUS = 0.38  # of a shape, as a share of its cell


def world_of(source: ScenesSource, split: str) -> World:
    """The difficulty of one split. UserError for parameters that no scene can satisfy."""
    if source.image_size % 28 or source.min_objects > source.max_objects or source.max_objects > len(CELLS):
        raise UserError(
            f"prepare.sources scenes: image_size {source.image_size} must be a multiple of 28, and "
            f"1 <= min_objects {source.min_objects} <= max_objects {source.max_objects} <= {len(CELLS)}"
        )
    hidden: tuple[tuple[str, str], ...] = {"pretrain": HELD_OUT, "test": ()}.get(split, TEST_ONLY)
    pairs = frozenset((colour, shape) for colour in COLOURS for shape in SHAPES) - frozenset(hidden)
    extra = 0 if split == "pretrain" else source.extra_objects
    max_objects = min(source.max_objects + extra, len(CELLS))
    return World(split, min(source.min_objects + min(extra, 1), max_objects), max_objects, pairs)


def generate(source: ScenesSource, split: str, seed: int, count: int | None = None) -> Iterator[Sample]:
    """Yield `count` questions of the split (None: as many as `source` says), its tasks in equal shares.

    A sample depends on `seed`, `split` and its index only. UserError for an unknown task.
    """
    unknown = [name for name in source.tasks + source.train_tasks if name not in BUILDERS]
    if unknown:
        raise UserError(f"prepare.sources scenes: unknown task '{unknown[0]}'; there are: {', '.join(BUILDERS)}")
    names = (source.train_tasks if split == "train" else ()) or source.tasks or tuple(BUILDERS)
    world = world_of(source, split)
    for index in range(int(getattr(source, split)) if count is None else count):
        world.rng.seed(f"{seed}/{split}/{index}")
        task = names[index % len(names)]
        puzzle = None
        while puzzle is None or not all(world.owns(layout) for layout in puzzle.layouts):
            puzzle = BUILDERS[task](world)
        yield Sample(
            id=f"scenes-{split}-{index:06d}",
            images=tuple(draw(layout, source.image_size, world.rng) for layout in puzzle.layouts),
            question=puzzle.question,
            answer=puzzle.answer,
            choices=puzzle.choices,
            rationale=f"{puzzle.rationale}.",
            task=task,
            capability=TASKS[task],
            source="scenes",
            scene=truth(puzzle.layouts),
        )


def truth(layouts: tuple[Layout, ...]) -> str:
    """The layouts as JSON: for each image {"objects": [{"cell", "row", "column", "colour", "shape"}, ...]}."""

    def fields(thing: Thing) -> dict[str, str | int]:
        row, column = divmod(thing.cell, 3)
        return {"cell": thing.place, "row": row, "column": column, "colour": thing.colour, "shape": thing.shape}

    return json.dumps([{"objects": [fields(thing) for thing in layout]} for layout in layouts])


def draw(layout: Layout, image_size: int, rng: random.Random) -> bytes:
    """The layout as PNG bytes, `image_size` pixels on both sides; places and colours vary a little with `rng`."""
    oversampling = 3
    cell = image_size * oversampling / 3
    image = Image.new("RGB", (image_size * oversampling,) * 2, BACKGROUND)
    canvas = ImageDraw.Draw(image)
    for thing in layout:
        row, column = divmod(thing.cell, 3)
        x = cell * (column + 0.5 + rng.uniform(-0.07, 0.07))
        y = cell * (row + 0.5 + rng.uniform(-0.07, 0.07))
        red, green, blue = (max(0, min(255, level + rng.randint(-12, 12))) for level in COLOURS[thing.colour])
        _draw_shape(canvas, thing.shape, x, y, cell * RADIUS * rng.uniform(0.9, 1.1), (red, green, blue))
    buffer = io.BytesIO()
    image.resize((image_size, image_size), Image.Resampling.BOX).save(buffer, "PNG")
    return buffer.getvalue()


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, int, int]
) -> None:
    def box(width: float, height: float) -> tuple[float, float, float, float]:
        return x - width, y - height, x + width, y + height

    if shape == "circle":
        canvas.ellipse(box(radius, radius), fill=fill)
    elif shape == "square":
        canvas.rectangle(box(radius * 0.85, radius * 0.85), fill=fill)
    elif shape == "cross":
        canvas.rectangle(box(radius, radius * 0.32), fill=fill)
        canvas.rectangle(box(radius * 0.32, radius), fill=fill)
    else:  # a star's every second point lies further in
        number, inner = {"triangle": (3, 1.0), "star": (10, 0.42)}[shape]
        turns = [2 * math.pi * index / number - math.pi / 2 for index in range(number)]
        reach = [radius * (inner if index % 2 else 1.0) for index in range(number)]
        canvas.polygon(
            [(x + r * math.cos(t), y + r * math.sin(t)) for r, t in zip(reach, turns, strict=True)], fill=fill
        )
