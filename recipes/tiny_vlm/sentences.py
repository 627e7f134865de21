"""Questions about the scenes of `boxes`, whose answers are known: numbers, and sentences that are true or false.

They are generated; nothing is taken from NLVR but its ways of speaking. Before the answer stands a thought: what is
counted in each box, of which boxes the sentence is true, and how many these are.
"""

import operator
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

from recipes.tiny_vlm.boxes import COLOURS, SHAPES, SIDES, SIZES, Box, Item, Scene, is_of_towers
from vismem.data.sample import Sample

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
ENDS = [(f"{way} of a tower", 0) for way in ("as the base", "at the base", "at the bottom")]
ENDS += [(f"{way} of a tower", -1) for way in ("as the top", "at the top")]
WALLS = (  # ways to say what a shape touches, and which sides that may be
    *((name, SIDES) for name in ("the edge", "the wall", "a wall", "any edge")),
    *((f"{name} of the box", (side,)) for side in ("left", "right") for name in (f"{side} wall", f"the {side} side")),
    *((name, ("bottom",)) for name in ("the base", "the bottom of a box")),
    ("the top of the box", ("top",)),
)
CORNERS = ("a corner", "the corner", "a box corner")
COUNTS = 0.7  # of what is drawn; the rest are sentences, which are asked twice
DRAWS = 40  # scenes that a sentence is tried on, to find one of which it is true and one of which it is false

Count = tuple[str, int, Callable[[int], bool]]  # words, the number that decides on the plural, and the rule
Phrase = tuple[str, str, Callable[[Item, Box], bool]]  # a noun, what follows it, and whether it is said of an item
Numbers = Callable[[Box], list[int]]  # what is counted in a box
Holding = tuple[str, Numbers, Callable[[Box], bool]]  # words, what is counted in a box, and the rule
Part = tuple[str, Numbers, Callable[[int], bool]]  # words, the one number that is counted in a box, and its rule
Reader = Callable[[Scene], tuple[str, str]]  # the thought before the answer, box by box, and the answer


def questions(scenes: Sequence[Scene], each: int, rng: random.Random) -> list[list[Sample]]:
    """For each scene questions about it, `each` on average: how many there are, or whether a sentence is true.

    A sentence is asked of one scene of which it is true and of one of which it is false: its words say nothing of that.
    """
    made: list[tuple[int, Sample]] = []  # with the scene
    kinds = {kind: [at for at, scene in enumerate(scenes) if is_of_towers(scene) == kind] for kind in (True, False)}
    while len(made) < each * len(scenes):
        at = rng.randrange(len(scenes))
        towers = is_of_towers(scenes[at])
        if rng.random() < COUNTS:
            text, read = _count(towers, rng)
            made.append((at, _asked(text, read(scenes[at]))))
            continue
        text, read = (_of_items if rng.random() < 0.35 else _of_boxes)(towers, rng)
        first = text[0].upper() if rng.random() < 0.8 else text[0]
        text = f"true or false: {first}{text[1:]}{rng.choice(('', '.'))}"
        found = {read(scenes[at])[1]: at for at in rng.choices(kinds[towers], k=DRAWS)}
        if len(found) == 2:
            made += [(at, _asked(text, read(scenes[at]))) for at in found.values()]
    asked: list[list[Sample]] = [[] for _ in scenes]
    for at, question in made:
        asked[at].append(question)
    return asked


def _asked(question: str, read: tuple[str, str]) -> Sample:
    return Sample(id="", images=(), question=question, rationale=read[0], answer=read[1])


def _count(towers: bool, rng: random.Random) -> tuple[str, Reader]:
    kind = rng.random()
    if kind < 0.2:
        inner, numbers, holds = _holding(towers, rng)
        return f"how many boxes with {inner}?", lambda scene: (
            _thought(*_counts(numbers, scene), _truths(holds, scene)),
            str(sum(map(holds, scene))),
        )
    noun, place, said = _phrase(towers, rng)
    text, numbers = f"how many {noun}s {place}".strip(), _number_of(said)
    if kind < 0.5:
        return f"{text}?", lambda scene: (_thought(*_counts(numbers, scene)), str(_total(numbers, scene)))
    return f"{text} in each box?", lambda scene: ("", " ".join(_counts(numbers, scene)))


def _number_of(said: Callable[[Item, Box], bool]) -> Numbers:
    return lambda box: [sum(said(item, box) for item in box)]


def _counts(numbers: Numbers, scene: Scene) -> list[str]:
    """Each number that is counted, in box after box."""
    return [" ".join(map(str, each)) for each in zip(*map(numbers, scene), strict=True)]


def _total(numbers: Numbers, scene: Scene) -> int:
    return sum(sum(numbers(box)) for box in scene)


def _truths(holds: Callable[[Box], bool], scene: Scene) -> str:
    return " ".join(str(holds(box)).lower() for box in scene)


def _thought(*parts: str) -> str:
    return f"{', '.join(parts)}."


def _quantity(rng: random.Random, most: int = 7) -> Count:
    n = min(rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6)), most)
    number = rng.choice((str(n), NUMBERS[n]))
    ways = [  # a weight, the words, and the rule with its number
        (30, rng.choice(("a", "a", "at least 1", "at least one")), operator.ge, 1),
        (20, rng.choice((f"exactly {number}", f"only {number}")), operator.eq, n),
        (20, number, operator.eq, n),
        (20, f"{rng.choice(('at least', 'atleast'))} {number}", operator.ge, n),
        (4, "no", operator.eq, 0),
        (3, f"at most {number}", operator.le, n),
        (2, f"more than {number}", operator.gt, n),
        (2, f"less than {number}", operator.lt, n),
        (2, "multiple", operator.ge, 2),
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
    wall, sides, least = "", tuple[str, ...](), 0  # so many of the sides it touches at least
    if placed and rng.random() < 0.35:
        (wall, sides), least = rng.choice(WALLS), 1
        if rng.random() < 0.1:
            wall, sides, least = rng.choice(CORNERS), SIDES, 2
    turned = rng.random() < 0.15
    return (
        " ".join(filter(None, (size, colour, noun))),
        f"{'not ' if turned else ''}{rng.choice(('', 'closely '))}touching {wall}" if wall else "",
        lambda i, _: (
            colour in ("", i.colour)
            and noun in ("item", "object", i.shape)
            and size in ("", SIZES[i.size])
            and (not wall or turned == (len(set(sides).intersection(i.walls)) < least))
        ),
    )


def _counted(quantity: Count, phrase: Phrase) -> str:
    return f"{quantity[0]} {phrase[0]}{'' if quantity[1] == 1 else 's'} {phrase[1]}".strip()


def _of_items(towers: bool, rng: random.Random) -> tuple[str, Reader]:
    quantity, phrase = _quantity(rng), _phrase(towers, rng)
    words, numbers = f"there {'is' if quantity[1] == 1 else 'are'} {_counted(quantity, phrase)}", _number_of(phrase[2])

    def read(scene: Scene) -> tuple[str, str]:
        total = _total(numbers, scene)
        return _thought(*_counts(numbers, scene), str(total)), str(quantity[2](total)).lower()

    return words, read


def _of_boxes(towers: bool, rng: random.Random) -> tuple[str, Reader]:
    inner, numbers, holds = _holding(towers, rng)
    noun = rng.choice(("tower", "tower", "box")) if towers else rng.choice(("box", "box", "box", "grey box"))
    every = rng.random() < 0.08
    words, n, rule = _quantity(rng, 3) if rng.random() < 0.6 else ("a", 1, lambda count: count > 0)
    verb, has, ending = ("is", "has", "") if n == 1 else ("are", "have", "es" if noun.endswith("x") else "s")
    joined = rng.choice(("with", "with", "with", f"that {has}", f"which {has}", "having"))
    text = f"there {verb} {words} {noun}{ending} {joined} {inner}"
    if every:
        text = f"{rng.choice(('all', 'each', 'every'))} {noun} has {inner}"

    def read(scene: Scene) -> tuple[str, str]:
        count = sum(map(holds, scene))
        truth = count == len(scene) if every else rule(count)
        return _thought(*_counts(numbers, scene), _truths(holds, scene), str(count)), str(truth).lower()

    return text, read


def _holding(towers: bool, rng: random.Random) -> Holding:
    """What a box has, in words, as numbers and as a rule."""
    kind, (one, other) = rng.random(), rng.sample(list(COLOURS), 2)
    things = "blocks" if towers else rng.choice(("items", "objects"))
    if kind < 0.08:
        return f"only {one} {things}", _nothing, lambda box: {i.colour for i in box} == {one}
    if kind < 0.14:
        words = rng.choice((f"only {one} and {other} {things}", f"{things} of only {one} and {other} color"))
        return words, _nothing, lambda box: {i.colour for i in box} == {one, other}
    if kind < 0.20:
        n = rng.randint(1, 3)
        words = rng.choice((f"{things} of {n} different colors", f"{things} in {n} different colors"))
        if n == 1:
            words = f"{rng.choice(('', 'all '))}{things} of the same color"
        return words, _colours, lambda box: _colours(box) == [n] and len(box) > 1
    if kind < 0.25:
        n, (words, least, rule) = rng.randint(1, 4), _quantity(rng, 2)
        words = f"{n} {things[:-1] if n == 1 else things} of which {words} {'is' if least == 1 else 'are'} {one}"
        said = _number_of(lambda item, _: item.colour == one)
        return words, lambda box: [len(box), *said(box)], lambda box: len(box) == n and rule(*said(box))
    if towers and kind < 0.31:
        words = f"a {one} block {rng.choice(('over', 'above', 'on top of'))} a {other} block"
        return words, _nothing, lambda box: (other, one) in pairwise(item.colour for item in box)
    parts = [_part(towers, rng) for _ in range(rng.choice((1, 1, 2)))]

    def numbers(box: Box) -> list[int]:
        return [number for _, each, _ in parts for number in each(box)]

    return (
        " and ".join(words for words, _, _ in parts),
        numbers,
        lambda box: all(rule(number) for (_, _, rule), number in zip(parts, numbers(box), strict=True)),
    )


def _part(towers: bool, rng: random.Random) -> Part:
    """One thing that a box has: so many shapes, or a tower's base or top."""
    if towers and rng.random() < 0.35:
        colour = rng.choice(list(COLOURS))
        at, place = rng.choice(((0, "base"), (-1, "top"), (0, "bottom")))
        words = rng.choice((f"a {colour} block at the {place}", f"the {place} {colour}", f"a {colour} {place}"))
        return words, lambda box: [int(box[at].colour == colour)], bool
    quantity, phrase = _quantity(rng), _phrase(towers, rng, placed=False)
    return _counted(quantity, phrase), _number_of(phrase[2]), quantity[2]


def _nothing(_: Box) -> list[int]:
    return []


def _colours(box: Box) -> list[int]:
    return [len({item.colour for item in box})]
