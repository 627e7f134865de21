"""What is asked of generated scenes of boxes: thought and answer follow from the scene, and the words do not tell."""

import random
import re
from collections import Counter

import pytest

from recipes.tiny_vlm.boxes import Box, Scene, draw_scene
from recipes.tiny_vlm.sentences import questions
from vismem.data.sample import Sample

NUMBERS = {"no": 0, "a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
PHRASE = r"(?:(exactly|only|at ?least) )?(\w+) (?:(black|yellow|blue) )?(circle|square|triangle|block|item|object)s?"


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, Sample]]:
    rng = random.Random(0)
    scenes = [draw_scene(rng) for _ in range(400)]
    return [(scene, one) for scene, each in zip(scenes, questions(scenes, 25, rng), strict=True) for one in each]


def count(box: Box, colour: str | None, noun: str) -> int:
    return sum(colour in (None, item.colour) and noun in ("item", "object", item.shape) for item in box)


def holds(number: int, quantity: str | None, word: str) -> bool:
    """Whether so many are "exactly two", "at least 1", "a" or "three"."""
    wanted = int(word) if word.isdigit() else NUMBERS[word]
    least = word == "a" if quantity is None else quantity.endswith("least")
    return number >= wanted if least else number == wanted


def spoken(*parts: list[int] | list[bool]) -> str:
    return ", ".join(" ".join(str(one).lower() for one in part) for part in parts) + "."


def test_what_is_said_and_thought_of_a_scene_is_so(asked: list[tuple[Scene, Sample]]) -> None:
    """Four kinds of question, worked out anew from their words."""
    checked = Counter[str]()
    for scene, one in asked:
        text = one.question.removeprefix("true or false: ").rstrip(".?").lower()
        if found := re.fullmatch(r"how many (black|yellow|blue) (circle|square|triangle|block)s( in each box)?", text):
            counts = [count(box, found[1], found[2]) for box in scene]
            assert one.answer == (" ".join(map(str, counts)) if found[3] else str(sum(counts)))
            assert one.rationale == ("" if found[3] else spoken(counts))
            checked[f"count{found[3]}"] += 1
        elif found := re.fullmatch(r"there is a (?:box|tower) with only (black|yellow|blue) (?:items|blocks)", text):
            truths = [{item.colour for item in box} == {found[1]} for box in scene]
            assert one.answer == str(any(truths)).lower()
            assert one.rationale == spoken(truths, [sum(truths)])
            checked[f"only {one.answer}"] += 1
        elif found := re.fullmatch(rf"there (?:is|are) (a (?:box|tower) (?:with|having|\w+ has) )?{PHRASE}", text):
            of_boxes, quantity, word, colour, noun = found.groups()
            counts = [count(box, colour, noun) for box in scene]
            if word in NUMBERS or word.isdigit():
                truths = [holds(number, quantity, word) for number in counts]
                truth = any(truths) if of_boxes else holds(sum(counts), quantity, word)
                assert one.answer == str(truth).lower(), text
                assert one.rationale == (
                    spoken(counts, truths, [sum(truths)]) if of_boxes else spoken(counts, [sum(counts)])
                )
                checked[f"{of_boxes and 'boxes'} {one.answer}"] += 1
    assert len(checked) == 8
    assert min(checked.values()) > 5


def test_the_answer_follows_from_the_thought(asked: list[tuple[Scene, Sample]]) -> None:
    for _, one in asked:
        parts = [part.split() for part in one.rationale.rstrip(".").split(", ")]
        if one.question.startswith("how many boxes"):
            assert one.answer == str(parts[-1].count("true"))
        elif one.question.startswith("how many") and one.rationale:
            assert one.answer == str(sum(map(int, parts[0])))
        elif one.question.startswith("true or false"):
            assert parts[-1] == [str(parts[-2].count("true"))] or parts[-1] == [str(sum(map(int, parts[-2])))]


def test_the_words_of_a_sentence_do_not_tell_whether_it_is_true(asked: list[tuple[Scene, Sample]]) -> None:
    """Each is asked as often where it is true as where it is false."""
    truths = {one.question: Counter[str]() for _, one in asked if one.question.startswith("true or false")}
    for _, one in asked:
        if one.question in truths:
            truths[one.question][one.answer] += 1
    assert len(truths) > 1000
    assert all(count["true"] == count["false"] == count.total() / 2 for count in truths.values())


def test_a_corner_is_where_two_walls_meet(asked: list[tuple[Scene, Sample]]) -> None:
    checked = Counter[str]()
    for scene, one in asked:
        if found := re.fullmatch(
            r"how many (black|yellow|blue) (\w+)s (not )?(?:closely )?touching \w+ (?:box )?corner\?", one.question
        ):
            at = [[item for item in box if (len(item.walls) < 2) == bool(found[3])] for box in scene]
            assert one.answer == str(sum(count(box, found[1], found[2]) for box in at))
            checked[one.answer] += 1
    assert len(checked) > 1
