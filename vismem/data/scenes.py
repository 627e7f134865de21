"""Generated scenes: coloured shapes on a 3x3 grid, drawn with Pillow, with questions asked from the scene's own truth.

What a scene may hold is in `tasks.layouts`; the questions themselves are in the other files of `tasks`.
"""

import io
import json
import math
import random
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from vismem.config import ScenesSource
from vismem.data.sample import Sample
from vismem.data.tasks import BUILDERS, TASKS
from vismem.data.tasks.layouts import CELLS, COLOURS, TEXTURES, Layout, Thing, World
from vismem.errors import UserError

BACKGROUND = (245, 245, 240)
DEPTH = 25  # levels by which a texture brightens and darkens its colour
RADIUS = 0.38  # of a shape, as a share of its cell
TRIES = 10_000  # scenes that are drawn for one question at most


def world_of(source: ScenesSource, split: str) -> World:
    """What the scenes of one split may hold. UserError for parameters that no scene can satisfy."""
    if source.image_size % 28 or not source.min_objects <= source.max_objects <= len(CELLS) or source.max_objects < 2:
        raise UserError(
            f"prepare.sources scenes: image_size {source.image_size} must be a multiple of 28, and "
            f"1 <= min_objects {source.min_objects} <= max_objects {source.max_objects}, which is 2 to {len(CELLS)}"
        )
    return World(split, source.min_objects, source.max_objects)


def generate(source: ScenesSource, split: str, seed: int, count: int | None = None, first: int = 0) -> Iterator[Sample]:
    """Yield `count` questions of the split (None: as many as `source` says) from `first` on, its tasks in equal shares.

    A sample depends on `seed`, `split` and its index only. UserError for an unknown task, and for one that finds
    nothing to ask in scenes of so few objects.
    """
    unknown = [name for name in source.tasks + source.train_tasks if name not in BUILDERS]
    if unknown:
        raise UserError(f"prepare.sources scenes: unknown task '{unknown[0]}'; there are: {', '.join(BUILDERS)}")
    names = (source.train_tasks if split == "train" else ()) or source.tasks or tuple(BUILDERS)
    world = world_of(source, split)
    for index in range(first, first + (int(getattr(source, split)) if count is None else count)):
        world.rng.seed(f"{seed}/{split}/{index}")
        task = names[index % len(names)]
        tries = (BUILDERS[task](world) for _ in range(TRIES))
        puzzle = next((made for made in tries if made and all(world.owns(layout) for layout in made.layouts)), None)
        if puzzle is None:
            held = f"{source.min_objects} to {source.max_objects} objects"
            raise UserError(f"prepare.sources scenes: task '{task}' finds nothing to ask in scenes of {held}")
        yield Sample(
            id=f"scenes-{split}-{index:06d}",
            images=tuple(draw(layout, source.image_size, world.rng) for layout in puzzle.layouts),
            question=puzzle.question,
            answer=puzzle.answer,
            choices=puzzle.choices,
            rationale=f"{puzzle.rationale}." if puzzle.rationale else "",
            task=task,
            capability=TASKS[task],
            source="scenes",
            scene=truth(puzzle.layouts),
        )


def truth(layouts: tuple[Layout, ...]) -> str:
    """The layouts as JSON: for each image {"objects": [{"cell", "row", "column", "colour", "shape", "texture"}]}."""

    def fields(thing: Thing) -> dict[str, str | int]:
        row, column = divmod(thing.cell, 3)
        seen = {"colour": thing.colour, "shape": thing.shape, "texture": thing.texture}
        return {"cell": thing.place, "row": row, "column": column, **seen}

    return json.dumps([{"objects": [fields(thing) for thing in layout]} for layout in layouts])


def draw(layout: Layout, image_size: int, rng: random.Random) -> bytes:
    """The layout as PNG bytes, `image_size` pixels on both sides; places and colours vary a little with `rng`.

    Textures alternate from one pixel to the next, down, across or both, so at half the size nothing is left of them.
    """
    side = 3 * image_size  # oversampled
    image, marks = Image.new("RGB", (side, side), BACKGROUND), Image.new("L", (side, side))
    for thing in layout:
        row, column = divmod(thing.cell, 3)
        x = side / 3 * (column + 0.5 + rng.uniform(-0.07, 0.07))
        y = side / 3 * (row + 0.5 + rng.uniform(-0.07, 0.07))
        red, green, blue = (
            max(DEPTH, min(255 - DEPTH, level + rng.randint(-12, 12))) for level in COLOURS[thing.colour]
        )
        radius = side / 3 * RADIUS * rng.uniform(0.9, 1.1)
        _draw_shape(ImageDraw.Draw(image), thing.shape, x, y, radius, (red, green, blue))
        _draw_shape(ImageDraw.Draw(marks), thing.shape, x, y, radius, TEXTURES.index(thing.texture))
    size = (image_size, image_size)
    pixels = np.asarray(image.resize(size, Image.Resampling.BOX), dtype=np.int16)
    texture = np.asarray(marks.resize(size, Image.Resampling.NEAREST), dtype=np.intp)
    down, across = 1 - 2 * (np.indices(size, dtype=np.int16) % 2)
    signs = np.choose(texture, (np.zeros_like(down), down, across, down * across))
    buffer = io.BytesIO()
    textured = (pixels + DEPTH * signs[..., None]).clip(0, 255).astype(np.uint8)
    Image.fromarray(textured).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def layouts_of(sample: Sample) -> tuple[Layout, ...]:
    """The layouts that a generated sample shows."""
    return tuple(
        tuple(Thing(CELLS.index(t["cell"]), t["colour"], t["shape"], t["texture"]) for t in scene["objects"])
        for scene in sample.scene_truth()
    )


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, int, int] | int
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
