"""Wide scenes as NLVR draws them: three boxes with shapes or with towers of blocks. They are generated."""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {"black": (0, 0, 0), "yellow": (255, 255, 0), "blue": (0, 153, 255)}
SHAPES = ("circle", "square", "triangle")
SIZES = {10: "small", 20: "medium", 30: "big"}  # pixels
SIDES = ("left", "right", "top", "bottom")
BOX, STEP, HEIGHT, WIDTH = 100, 150, 100, 400  # pixels: a box's side, from box to box, and the picture
GROUND, BETWEEN = (211, 211, 211), (128, 128, 128)
TRIES = 12  # for a free place
SCALE = 3  # oversampling


@dataclass(frozen=True)
class Item:
    """One shape; `left` and `top` are pixels within its box."""

    box: int
    left: int
    top: int
    size: int
    colour: str
    shape: str  # one of SHAPES, or a block of a tower

    @property
    def walls(self) -> tuple[str, ...]:
        """The walls of the box that it touches."""
        gaps = (self.left, BOX - self.left - self.size, self.top, BOX - self.top - self.size)
        return tuple(side for side, gap in zip(SIDES, gaps, strict=True) if gap <= 1)


Box = Sequence[Item]  # a tower's from the base upwards
Scene = Sequence[Box]


def draw_scene(rng: random.Random) -> Scene:
    """Towers of one to four blocks, or one to seven shapes in each box that do not overlap; many touch walls."""
    draw = _tower if rng.random() < 0.5 else _scattered
    return [draw(rng, box) for box in range(3)]


def picture(scene: Scene) -> bytes:
    """The scene as PNG bytes, 400 x 100."""
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), GROUND)
    canvas = ImageDraw.Draw(image)
    for start in (BOX, BOX + STEP):
        canvas.rectangle((start * SCALE, 0, (start + STEP - BOX) * SCALE - 1, HEIGHT * SCALE), fill=BETWEEN)
    for item in (item for box in scene for item in box):
        x, y, side = SCALE * (item.left + item.box * STEP), SCALE * item.top, SCALE * item.size - 1
        if item.shape == "triangle":
            canvas.polygon([(x + side / 2, y), (x, y + side), (x + side, y + side)], fill=COLOURS[item.colour])
        else:
            draw = canvas.ellipse if item.shape == "circle" else canvas.rectangle
            draw((x, y, x + side, y + side), fill=COLOURS[item.colour])
    buffer = io.BytesIO()
    image.resize((WIDTH, HEIGHT), Image.Resampling.BOX).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def is_of_towers(scene: Scene) -> bool:
    """Whether it has towers of blocks."""
    return scene[0][0].shape == "block"


def _tower(rng: random.Random, box: int) -> Box:
    levels, colours = range(rng.randint(1, 4)), list(COLOURS)
    return [Item(box, 40, 80 - 21 * level, 20, rng.choice(colours), "block") for level in levels]


def _scattered(rng: random.Random, box: int) -> Box:
    items: list[Item] = []
    for _ in range(rng.randint(1, 7)):
        for _ in range(TRIES):
            size = rng.choice(list(SIZES))
            left, top = (rng.randint(0, BOX - size) for _ in range(2))
            if rng.random() < 0.3:
                wall, side = rng.choice((0, BOX - size)), rng.choice((0, BOX - size))
                left, top = rng.choice(((wall, top), (wall, top), (left, wall), (left, wall), (wall, side)))
            apart = (
                max(left - i.left - i.size, i.left - left - size, top - i.top - i.size, i.top - top - size)
                for i in items
            )
            if min(apart, default=0) >= 0:
                items.append(Item(box, left, top, size, rng.choice(list(COLOURS)), rng.choice(SHAPES)))
                break
    return items
