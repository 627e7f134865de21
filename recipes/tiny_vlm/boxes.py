"""Wide scenes as NLVR draws them, three boxes with shapes or with towers of blocks, and sentences of known truth.

Scenes and sentences are generated: nothing is taken from NLVR but its sizes, colours and ways of speaking.
"""

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {"black": (0, 0, 0), "yellow": (255, 255, 0), "blue": (0, 153, 255)}
SHAPES = ("circle", "square", "triangle")
SIZES = {10: "small", 20: "medium", 30: "big"}  # pixels
SIDES = ("left", "right", "top", "bottom")
BOX, GAP, WIDTH, HEIGHT = 100, 50, 400, 100  # pixels
GROUND, BETWEEN = (211, 211, 211), (128, 128, 128)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
TRIES = 12  # for a sentence of the wanted truth


@dataclass(frozen=True)
class Item:
    """One shape; `left` and `top` are pixels within its box."""

    box: int
    left: int
    top: int
    size: int
    colour: str
    shape: str

    @property
    def walls(self) -> tuple[str, ...]:
        """The walls of the box that it touches."""
        ends = (self.left, BOX - self.left - self.size, self.top, BOX - self.top - self.size)
        return tuple(side for side, distance in zip(SIDES, ends, strict=True) if distance <= 1)


@dataclass(frozen=True)
class Scene:
    """What three boxes hold; in `towers`, from the base upwards."""

    boxes: tuple[tuple[Item, ...], ...]
    towers: bool

    @property
    def items(self) -> list[Item]:
        """All of them."""
        return [item for box in self.boxes for item in box]


Test = Callable[[Item, Sequence[Item]], bool]  # of an item, beside those of its box
BoxTest = Callable[[Sequence[Item]], bool]
Count = tuple[str, int, Callable[[int], bool]]  # words, the number that they name, and the rule


def draw_scene(rng: random.Random) -> Scene:
    """Towers of one to four blocks, or one to eight shapes in each box that do not overlap; many touch a wall."""
    towers = rng.random() < 0.5
    return Scene(tuple(tuple(_tower(rng, box) if towers else _scattered(rng, box)) for box in range(3)), towers)


def picture(scene: Scene) -> bytes:
    """The scene as PNG bytes, 400 x 100."""
    scale = 3  # oversampled
    image = Image.new("RGB", (WIDTH * scale, HEIGHT * scale), GROUND)
    canvas = ImageDraw.Draw(image)
    for start in (BOX, 2 * BOX + GAP):
        canvas.rectangle((start * scale, 0, (start + GAP) * scale - 1, HEIGHT * scale), fill=BETWEEN)
    for item in scene.items:
        x, y = (item.left + item.box * (BOX + GAP)) * scale, item.top * scale
        end_x, end_y, fill = x + item.size * scale - 1, y + item.size * scale - 1, COLOURS[item.colour]
        if item.shape == "circle":
            canvas.ellipse((x, y, end_x, end_y), fill=fill)
        elif item.shape == "square":
            canvas.rectangle((x, y, end_x, end_y), fill=fill)
        else:
            canvas.polygon([((x + end_x) / 2, y), (x, end_y), (end_x, end_y)], fill=fill)
    buffer = io.BytesIO()
    image.resize((WIDTH, HEIGHT), Image.Resampling.BOX).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about the scene and its answer: a sentence that is as often true as false, or a number asked for."""
    if rng.random() < 0.25:
        return _how_many(scene, rng)
    wanted = rng.random() < 0.5
    while True:
        make = rng.choice((_of_items, _of_boxes, _of_boxes))
        for _ in range(TRIES):
            sentence, truth = make(scene, rng)
            if truth == wanted:
                first = sentence[0].upper() if rng.random() < 0.8 else sentence[0]
                return f"true or false: {first}{sentence[1:]}{rng.choice(('', '.'))}", str(truth).lower()


def _tower(rng: random.Random, box: int) -> list[Item]:
    colours = rng.sample(list(COLOURS), rng.choice((1, 2, 3, 3)))
    return [
        Item(box, 40, 80 - 21 * level, 20, rng.choice(colours), "square") for level in range(rng.choice((1, 2, 3, 4, 4)))
    ]


def _scattered(rng: random.Random, box: int) -> list[Item]:
    items: list[Item] = []
    colours, shapes = rng.sample(list(COLOURS), rng.randint(1, 3)), rng.sample(SHAPES, rng.randint(1, 3))
    for _ in range(rng.choice((1, 1, 2, 3, 4, 5, 6, 7, 8))):
        for _ in range(TRIES):
            size = rng.choice(list(SIZES))
            left, top = (rng.randint(0, BOX - size) for _ in range(2))
            if rng.random() < 0.3:
                left, top = rng.choice(((0, top), (BOX - size, top), (left, 0), (left, BOX - size)))
            if all(
                abs(left + size / 2 - o.left - o.size / 2) >= (size + o.size) / 2
                or abs(top + size / 2 - o.top - o.size / 2) >= (size + o.size) / 2
                for o in items
            ):
                items.append(Item(box, left, top, size, rng.choice(colours), rng.choice(shapes)))
                break
    return items


def _quantity(rng: random.Random, most: int = 4) -> Count:
    n = min(rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6)), most)
    number = rng.choice((str(n), NUMBERS[n]))
    kind = rng.random()
    if kind < 0.3:
        return (rng.choice(("a", "a", "at least 1", "at least one")), 1, lambda count: count >= 1)
    if kind < 0.7:
        words = rng.choice((f"exactly {number}", f"only {number}", number, number))
        return words, n, (lambda count: count >= 1) if words == number and n == 1 else (lambda count: count == n)
    if kind < 0.9:
        return f"{rng.choice(('at least', 'atleast'))} {number}", n, lambda count: count >= n
    if kind < 0.94:
        return "no", 1, lambda count: count == 0
    if kind < 0.97:
        return f"at most {number}", n, lambda count: count <= n
    return f"{rng.choice(('more', 'less'))} than {number}", n, lambda count: count > n  # `less` is mended by its caller


def _phrase(scene: Scene, rng: random.Random, placed: bool = True) -> tuple[str, str, Test]:
    """Words before and after a noun's ending, such as "black square" and "touching the wall", and what they say."""
    colour = rng.choice((*COLOURS, *COLOURS, ""))
    if scene.towers:
        noun, place, there = "block", "", _anywhere
        if placed and rng.random() < 0.3:
            place, there = rng.choice(
                (
                    (f"{rng.choice(('as the base', 'at the base', 'at the bottom'))} of a tower", _is_base),
                    (f"{rng.choice(('as the top', 'at the top'))} of a tower", _is_top),
                )
            )
        return f"{colour} {noun}".strip(), place, lambda i, box: colour in ("", i.colour) and there(i, box)
    noun = rng.choice(("item", "object", *SHAPES))
    size = rng.choice(list(SIZES.values())) if rng.random() < 0.06 else ""
    sides, place, turned = SIDES, "", False
    if placed and rng.random() < 0.35:
        side = rng.choice((*SIDES, "", "", "", ""))
        sides = (side,) if side else SIDES
        wall = rng.choice(("the edge", "the wall", "a wall", "any edge"))
        names = {"": wall, "bottom": rng.choice(("the base", "the bottom of a box")), "top": "the top of the box"}
        place = f"{rng.choice(('', 'closely '))}touching {names.get(side, f'{side} wall of a box')}"
        if turned := rng.random() < 0.15:
            place = f"not {place}"
    return (
        " ".join(filter(None, (size, colour, noun))),
        place,
        lambda i, _: (
            colour in ("", i.colour)
            and (noun == i.shape or noun not in SHAPES)
            and size in ("", SIZES[i.size])
            and (not place or turned != any(side in i.walls for side in sides))
        ),
    )


def _counted(words: str, number: int, phrase: tuple[str, str, Test]) -> str:
    noun, place, _ = phrase
    many = number != 1 or words == "no"
    return f"{words} {noun}{'s' if many else ''} {place}".strip()


def _of_items(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    quantity, phrase = _ruled(rng), _phrase(scene, rng)
    count = sum(phrase[2](item, box) for box in scene.boxes for item in box)
    return f"{_there(quantity)} {_counted(*quantity[:2], phrase)}", quantity[2](count)


def _of_boxes(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    inner, test = _holding(scene, rng)
    count = sum(map(test, scene.boxes))
    noun = rng.choice(("tower", "tower", "box")) if scene.towers else "box"
    if rng.random() < 0.08:
        return f"{rng.choice(('all', 'each', 'every'))} {noun} has {inner}", count == 3
    quantity = _ruled(rng, 3) if rng.random() < 0.6 else ("a", 1, lambda found: found >= 1)
    many = "" if quantity[1] == 1 and quantity[0] != "no" else "es" if noun == "box" else "s"
    return f"{_there(quantity)} {quantity[0]} {noun}{many} with {inner}", quantity[2](count)


def _how_many(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        noun, place, test = _phrase(scene, rng)
        count = sum(test(item, box) for box in scene.boxes for item in box)
        return f"how many {noun}s {place}".strip() + "?", str(count)
    inner, holds = _holding(scene, rng)
    return f"how many boxes with {inner}?", str(sum(map(holds, scene.boxes)))


def _holding(scene: Scene, rng: random.Random) -> tuple[str, BoxTest]:
    """What a box has, in words and as a rule."""
    kind, (one, other) = rng.random(), rng.sample(list(COLOURS), 2)
    things = "blocks" if scene.towers else rng.choice(("items", "objects"))
    if kind < 0.1:
        return f"only {one} {things}", lambda box: {i.colour for i in box} == {one}
    if kind < 0.18:
        words = rng.choice((f"only {one} and {other} {things}", f"{things} of only {one} and {other} color"))
        return words, lambda box: {i.colour for i in box} == {one, other}
    if kind < 0.25:
        n = rng.randint(1, 3)
        words = f"{things} of {n} different colors" if n > 1 else rng.choice((f"{things} of the same color",))
        return words, lambda box: len({i.colour for i in box}) == n and len(box) > 1
    if scene.towers and kind < 0.45:
        at, place = rng.choice(((0, "base"), (-1, "top"), (0, "bottom")))
        words = rng.choice((f"a {one} block at the {place}", f"the {place} {one}", f"a {one} {place}"))
        return words, lambda box: box[at].colour == one
    if scene.towers and kind < 0.52:
        over = rng.choice(("over", "above", "on top of"))
        return f"a {one} block {over} a {other} block", lambda box: any(
            low.colour == other and high.colour == one for low, high in zip(box, box[1:], strict=False)
        )
    parts = [(_ruled(rng), _phrase(scene, rng, placed=False)) for _ in range(rng.choice((1, 1, 2)))]
    return " and ".join(_counted(*quantity[:2], phrase) for quantity, phrase in parts), lambda box: all(
        quantity[2](sum(phrase[2](item, box) for item in box)) for quantity, phrase in parts
    )


def _ruled(rng: random.Random, most: int = 7) -> Count:
    words, n, rule = _quantity(rng, most)
    return (words, n, lambda count: count < n) if words.startswith("less") else (words, n, rule)


def _there(quantity: Count) -> str:
    return "there is" if quantity[1] == 1 and quantity[0] != "no" else "there are"


def _anywhere(item: Item, box: Sequence[Item]) -> bool:
    return True


def _is_base(item: Item, box: Sequence[Item]) -> bool:
    return item is box[0]


def _is_top(item: Item, box: Sequence[Item]) -> bool:
    return item is box[-1]
