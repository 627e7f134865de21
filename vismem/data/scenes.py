"""Generated scenes: coloured shapes on a 3x3 grid, drawn with Pillow, with questions asked from the scene's own truth.

The layout (what stands in which cell) decides by its hash to which split an image may belong, so that no image of one
split can appear in another. The questions themselves are in `tasks`.
"""

import hashlib
import io
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from vismem.config import ScenesSource
from vismem.data.sample import Capability, Sample
from vismem.errors import UserError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 220),
    "yellow": (240, 205, 40),
    "purple": (135, 50, 175),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
RADIUS = 0.38  # of a shape, as a share of its cell
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
CELLS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
SPLITS = ("pretrain", "train", "validation", "test")
BACKGROUND = (245, 245, 240)

# Colour-shape pairs that the pretrain split never shows; the last two are shown by the test split only.
HELD_OUT = (
    ("green", "circle"),
    ("purple", "square"),
    ("red", "triangle"),
    ("black", "star"),
    ("yellow", "circle"),
    ("blue", "cross"),
)
TEST_ONLY = HELD_OUT[-2:]


@dataclass(frozen=True, order=True)
class Thing:
    """One object. `cell` counts from 0 (top left) to 8 (bottom right) in reading order."""

    cell: int
    colour: str
    shape: str

    @property
    def place(self) -> str:
        """The cell's name, such as "top left"."""
        return CELLS[self.cell]

    @property
    def name(self) -> str:
        """Colour and shape, such as "red circle"."""
        return f"{self.colour} {self.shape}"


Layout = tuple[Thing, ...]  # one image, in reading order


@dataclass(frozen=True)
class World:
    """What the scenes of one split may hold: the number of objects, the colour-shape pairs, the question forms."""

    split: str
    least: int
    most: int
    pairs: frozenset[tuple[str, str]]

    @property
    def hard(self) -> bool:
        """Every split but pretrain."""
        return self.split != "pretrain"

    def number(self, rng: random.Random, least: int = 1, most: int = 9) -> int:
        """A number of objects within the split's range and the task's own bounds."""
        low = max(self.least, least)
        return rng.randint(low, max(low, min(self.most, most)))

    def owns(self, layout: Layout) -> bool:
        """Whether this split may show the layout; exactly one split may."""
        text = "|".join(f"{t.cell},{t.colour},{t.shape}" for t in layout)
        return SPLITS[hashlib.sha256(text.encode()).digest()[0] % len(SPLITS)] == self.split

    def form(self, rng: random.Random, forms: tuple[str, ...]) -> str:
        """One wording. The last is for a tenth of the test split, the one before it for all splits but pretrain."""
        if self.split == "test" and rng.random() < 0.1:
            return forms[-1]
        return rng.choice(forms[:-1] if self.hard else forms[:-2])


@dataclass(frozen=True)
class Puzzle:
    """A question with its layouts and its answer."""

    layouts: tuple[Layout, ...]
    question: str
    answer: str
    rationale: str = ""
    choices: tuple[str, ...] = ()


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
    most = min(source.max_objects + extra, len(CELLS))
    return World(split, min(source.min_objects + min(extra, 1), most), most, pairs)


def generate(source: ScenesSource, split: str, seed: int, count: int | None = None) -> Iterator[Sample]:
    """Yield `count` questions of the split (None: as many as `source` says), its tasks in equal shares.

    A sample depends on `seed`, `split` and its index only. UserError for an unknown task.
    """
    from vismem.data.tasks import BUILDERS, TASKS

    unknown = [name for name in source.tasks + source.train_tasks if name not in BUILDERS]
    if unknown:
        raise UserError(f"prepare.sources scenes: unknown task '{unknown[0]}'; there are: {', '.join(BUILDERS)}")
    names = (source.train_tasks if split == "train" else ()) or source.tasks or tuple(BUILDERS)
    world = world_of(source, split)
    for index in range(int(getattr(source, split)) if count is None else count):
        rng = random.Random(f"{seed}/{split}/{index}")
        task = names[index % len(names)]
        puzzle = None
        while puzzle is None or not all(world.owns(layout) for layout in puzzle.layouts):
            puzzle = BUILDERS[task](rng, world)
        yield Sample(
            id=f"scenes-{split}-{index:06d}",
            images=tuple(draw(layout, source.image_size, rng) for layout in puzzle.layouts),
            question=puzzle.question,
            answer=puzzle.answer,
            choices=puzzle.choices,
            rationale=puzzle.rationale,
            task=task,
            capability=Capability(TASKS[task]),
            source="scenes",
            scene=truth(puzzle.layouts),
        )


def truth(layouts: tuple[Layout, ...]) -> str:
    """The layouts as JSON: for each image {"objects": [{"cell", "row", "column", "colour", "shape"}, ...]}."""

    def fields(thing: Thing) -> dict[str, str | int]:
        row, column = divmod(thing.cell, 3)
        return {
            "cell": thing.place,
            "row": row,
            "column": column,
            "colour": thing.colour,
            "shape": thing.shape,
        }

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
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        side = radius * 0.85
        canvas.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif shape == "cross":
        arm = radius * 0.32
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    else:
        corners, inner = {"triangle": (3, 0.0), "diamond": (4, 0.0), "star": (5, 0.42)}[shape]
        points = []
        for index in range(corners * (2 if inner else 1)):
            angle = 2 * math.pi * index / (corners * (2 if inner else 1)) - math.pi / 2
            reach = radius * (inner if inner and index % 2 else 1.0)
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        canvas.polygon(points, fill=fill)
