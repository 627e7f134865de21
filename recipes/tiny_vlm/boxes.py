"""Wide scenes as NLVR draws them, three boxes with shapes or with towers of blocks, and sentences of known truth.

Scenes and sentences are generated: nothing is taken from NLVR but its sizes, colours and ways of speaking.
"""

import io
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

COLOURS = {"black": (0, 0, 0), "yellow": (255, 255, 0), "blue": (0, 153, 255)}
SHAPES = ("circle", "square", "triangle")
SIZES = {10: "small", 20: "medium", 30: "big"}  # pixels
SIDES = ("left", "right", "top", "bottom")
BOX, STEP, HEIGHT, WIDTH = 100, 150, 100, 400  # pixels: a box's side, from box to box, and the picture
GROUND, BETWEEN = (211, 211, 211), (128, 128, 128)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
ENDS = [(f"{way} of a tower", 0) for way in ("as the base", "at the base", "at the bottom")]
ENDS += [(f"{way} of a tower", -1) for way in ("as the top", "at the top")]
WALLS = (  # ways to say what a shape touches, and which sides that may be
    *((name, SIDES) for name in ("the edge", "the wall", "a wall", "any edge")),
    *((f"{side} wall of a box", (side,)) for side in ("left", "right")),
    *((name, ("bottom",)) for name in ("the base", "the bottom of a box")),
    ("the top of the box", ("top",)),
)
COUNTS = 0.7  # of what is drawn; the rest are sentences, which are asked twice
DRAWS = 40  # scenes that a sentence is tried on, to find one of which it is true and one of which it is false
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
Count = tuple[str, int, Callable[[int], bool]]  # words, the number that decides on the plural, and the rule
Sentence = tuple[str, Callable[[Scene], bool]]
Phrase = tuple[str, str, Callable[[Item, Box], bool]]  # a noun, what follows it, and whether it is said of an item


def draw_scene(rng: random.Random) -> Scene:
    """Towers of one to four blocks, or one to eight shapes in each box that do not overlap; many touch a wall."""
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


def questions(scenes: Sequence[Scene], each: int, rng: random.Random) -> list[list[tuple[str, str]]]:
    """For each scene questions with answers, `each` on average: numbers, or whether a sentence is true.

    A sentence is asked of one scene of which it is true and of one of which it is false: its words say nothing of that.
    """
    made: list[tuple[int, str, str]] = []  # the scene, the question and its answer
    kinds = {kind: [at for at, scene in enumerate(scenes) if _towers(scene) == kind] for kind in (True, False)}
    while len(made) < each * len(scenes):
        at = rng.randrange(len(scenes))
        towers = _towers(scenes[at])
        if rng.random() < COUNTS:
            text, counted = _count(towers, rng)
            made.append((at, text, counted(scenes[at])))
            continue
        text, rule = (_of_items if rng.random() < 0.35 else _of_boxes)(towers, rng)
        first = text[0].upper() if rng.random() < 0.8 else text[0]
        text = f"true or false: {first}{text[1:]}{rng.choice(('', '.'))}"
        found = {rule(scenes[at]): at for at in rng.choices(kinds[towers], k=DRAWS)}
        if len(found) == 2:
            made += [(at, text, str(truth).lower()) for truth, at in found.items()]
    asked: list[list[tuple[str, str]]] = [[] for _ in scenes]
    for at, text, answer in made:
        asked[at].append((text, answer))
    return asked


def _towers(scene: Scene) -> bool:
    return scene[0][0].shape == "block"


def _count(towers: bool, rng: random.Random) -> tuple[str, Callable[[Scene], str]]:
    kind = rng.random()
    if kind < 0.2:
        inner, holds = _holding(towers, rng)
        return f"how many boxes with {inner}?", lambda scene: str(sum(map(holds, scene)))
    noun, place, said = _phrase(towers, rng)
    text = f"how many {noun}s {place}".strip()
    if kind < 0.5:
        return f"{text}?", lambda scene: str(sum(said(item, box) for box in scene for item in box))
    return f"{text} in each box?", lambda scene: " ".join(str(sum(said(item, box) for item in box)) for box in scene)


def _tower(rng: random.Random, box: int) -> Box:
    colours = rng.sample(list(COLOURS), rng.choice((1, 2, 3, 3)))
    levels = range(rng.choice((1, 2, 3, 4, 4)))
    return [Item(box, 40, 80 - 21 * level, 20, rng.choice(colours), "block") for level in levels]


def _scattered(rng: random.Random, box: int) -> Box:
    items: list[Item] = []
    colours, shapes = rng.sample(list(COLOURS), rng.randint(1, 3)), rng.sample(SHAPES, rng.randint(1, 3))
    for _ in range(rng.choice((1, 1, 2, 3, 4, 5, 6, 7, 8))):
        for _ in range(TRIES):
            size = rng.choice(list(SIZES))
            left, top = (rng.randint(0, BOX - size) for _ in range(2))
            if rng.random() < 0.3:
                left, top = rng.choice(((0, top), (BOX - size, top), (left, 0), (left, BOX - size)))
            apart = (
                max(left - i.left - i.size, i.left - left - size, top - i.top - i.size, i.top - top - size)
                for i in items
            )
            if min(apart, default=0) >= 0:
                items.append(Item(box, left, top, size, rng.choice(colours), rng.choice(shapes)))
                break
    return items


def _quantity(rng: random.Random, most: int = 7) -> Count:
    n = min(rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6)), most)
    number = rng.choice((str(n), NUMBERS[n]))
    ways = [  # a weight, the words, and the rule with its number
        (30, rng.choice(("a", "a", "at least 1", "at least one")), operator.ge, 1),
        (20, rng.choice((f"exactly {number}", f"only {number}")), operator.eq, n),
        (20, number, operator.ge if n == 1 else operator.eq, n),
        (20, f"{rng.choice(('at least', 'atleast'))} {number}", operator.ge, n),
        (4, "no", operator.eq, 0),
        (3, f"at most {number}", operator.le, n),
        (2, f"more than {number}", operator.gt, n),
        (2, f"less than {number}", operator.lt, n),
    ]
    _, words, rule, n = rng.choices(ways, [way[0] for way in ways])[0]
    return words, n, lambda count: rule(count, n)


def _phrase(towers: bool, rng: random.Random, placed: bool = True) -> Phrase:
    colour = rng.choice((*COLOURS, *COLOURS, ""))
    if towers:
        place, at = rng.choice(ENDS) if placed and rng.random() < 0.3 else ("", None)
        return f"{colour} block".strip(), place, lambda i, b: colour in ("", i.colour) and (at is None or i is b[at])
    noun = rng.choice(("item", "object", *SHAPES))
    size = rng.choice(list(SIZES.values())) if rng.random() < 0.06 else ""
    wall, sides = rng.choice(WALLS) if placed and rng.random() < 0.35 else ("", ())
    turned = rng.random() < 0.15
    return (
        " ".join(filter(None, (size, colour, noun))),
        f"{'not ' if turned else ''}{rng.choice(('', 'closely '))}touching {wall}" if wall else "",
        lambda i, _: (
            colour in ("", i.colour)
            and noun in ("item", "object", i.shape)
            and size in ("", SIZES[i.size])
            and (not wall or turned == set(sides).isdisjoint(i.walls))
        ),
    )


def _counted(quantity: Count, phrase: Phrase) -> str:
    return f"{quantity[0]} {phrase[0]}{'' if quantity[1] == 1 else 's'} {phrase[1]}".strip()


def _of_items(towers: bool, rng: random.Random) -> Sentence:
    quantity, phrase = _quantity(rng), _phrase(towers, rng)
    words = f"there {'is' if quantity[1] == 1 else 'are'} {_counted(quantity, phrase)}"
    return words, lambda scene: quantity[2](sum(phrase[2](item, box) for box in scene for item in box))


def _of_boxes(towers: bool, rng: random.Random) -> Sentence:
    inner, holds = _holding(towers, rng)
    noun = rng.choice(("tower", "tower", "box")) if towers else "box"
    if rng.random() < 0.08:
        return f"{rng.choice(('all', 'each', 'every'))} {noun} has {inner}", lambda scene: all(map(holds, scene))
    words, n, rule = _quantity(rng, 3) if rng.random() < 0.6 else ("a", 1, lambda count: count > 0)
    verb, ending = ("is", "") if n == 1 else ("are", "es" if noun == "box" else "s")
    return f"there {verb} {words} {noun}{ending} with {inner}", lambda scene: rule(sum(map(holds, scene)))


def _holding(towers: bool, rng: random.Random) -> tuple[str, Callable[[Box], bool]]:
    """What a box has, in words and as a rule."""
    kind, (one, other) = rng.random(), rng.sample(list(COLOURS), 2)
    things = "blocks" if towers else rng.choice(("items", "objects"))
    if kind < 0.1:
        return f"only {one} {things}", lambda box: {i.colour for i in box} == {one}
    if kind < 0.18:
        words = rng.choice((f"only {one} and {other} {things}", f"{things} of only {one} and {other} color"))
        return words, lambda box: {i.colour for i in box} == {one, other}
    if kind < 0.25:
        n = rng.randint(1, 3)
        words = f"{things} of {n} different colors" if n > 1 else f"{things} of the same color"
        return words, lambda box: len({i.colour for i in box}) == n and len(box) > 1
    if towers and kind < 0.45:
        at, place = rng.choice(((0, "base"), (-1, "top"), (0, "bottom")))
        words = rng.choice((f"a {one} block at the {place}", f"the {place} {one}", f"a {one} {place}"))
        return words, lambda box: box[at].colour == one
    if towers and kind < 0.52:
        words = f"a {one} block {rng.choice(('over', 'above', 'on top of'))} a {other} block"
        return words, lambda box: (other, one) in pairwise(item.colour for item in box)
    parts = [(_quantity(rng), _phrase(towers, rng, placed=False)) for _ in range(rng.choice((1, 1, 2)))]
    return " and ".join(_counted(*part) for part in parts), lambda box: all(
        rule(sum(said(item, box) for item in box)) for (_, _, rule), (_, _, said) in parts
    )
