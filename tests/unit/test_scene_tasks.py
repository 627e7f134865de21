"""Each task's answer follows from the scene's own truth, worked out another way."""

from collections import Counter
from typing import Any

import pytest

from vismem.config import ScenesSource
from vismem.data.sample import Sample
from vismem.data.scenes import generate
from vismem.data.tasks import NEEDS
from vismem.data.tasks.layouts import CELLS, COLOURS, MOVES, SHAPES, SIGNS, SPLITS


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    source = ScenesSource(tasks=())
    return [sample for split in SPLITS for sample in generate(source, split, 0, 690)]


def objects(sample: Sample, image: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = sample.scene_truth()[image]["objects"]
    return found


def name(thing: dict[str, Any]) -> str:
    return f"{thing['colour']} {thing['shape']}"


def of_task(samples: list[Sample], task: str) -> list[Sample]:
    chosen = [sample for sample in samples if sample.task == task]
    assert chosen
    return chosen


def words(sample: Sample) -> list[str]:
    return [word.strip(",.?") for word in sample.question.split()]


def test_counts_are_those_of_the_scene(samples: list[Sample]) -> None:
    singular = {f"{shape}{'es' if shape == 'cross' else 's'}": shape for shape in SHAPES}
    for sample in of_task(samples, "count"):
        wanted = {singular.get(word, word) for word in words(sample)}
        wanted &= {*COLOURS, *SHAPES}
        assert len(wanted) == 1
        hits = [t for t in objects(sample) if wanted & {t["colour"], t["shape"]}]
        assert sample.answer == str(len(hits))


def test_differences_are_those_of_the_scene(samples: list[Sample]) -> None:
    singular = {f"{shape}{'es' if shape == 'cross' else 's'}": shape for shape in SHAPES}
    for sample in of_task(samples, "compare"):
        named = [singular.get(w, w) for w in words(sample) if w in COLOURS or w in singular]
        more, fewer = (sum(value in (t["colour"], t["shape"]) for t in objects(sample)) for value in named)
        assert sample.answer == str(more - fewer)


def test_places_and_contents_agree_with_the_scene(samples: list[Sample]) -> None:
    for sample in of_task(samples, "ground"):
        hits = [t["cell"] for t in objects(sample) if name(t) in sample.question]
        assert hits == [sample.answer]
    for sample in of_task(samples, "retrieve"):
        hits = [name(t) for t in objects(sample) if t["cell"] in sample.question]
        assert hits == [sample.answer]


def test_two_images_share_or_differ_in_exactly_what_the_answer_says(samples: list[Sample]) -> None:
    for sample in of_task(samples, "match"):
        first, second = ({name(t) for t in objects(sample, image)} for image in (0, 1))
        assert first & second == {sample.answer}
    for sample in of_task(samples, "change"):
        first, second = ({t["cell"]: name(t) for t in objects(sample, image)} for image in (0, 1))
        assert first.keys() == second.keys()
        assert [cell for cell in first if first[cell] != second[cell]] == [sample.answer]


def test_a_walk_ends_at_the_answer(samples: list[Sample]) -> None:
    step = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
    for sample in of_task(samples, "chain"):
        at = {(t["row"], t["column"]): name(t) for t in objects(sample)}
        moves = [word for word in words(sample) if word in step]
        if not sample.question.startswith("start"):
            moves.reverse()
        starts = [place for place, thing in at.items() if thing in sample.question]
        assert len(starts) == 1
        row, column = starts[0]
        for move in moves:
            row, column = row + step[move][0], column + step[move][1]
            assert (row, column) in at
        assert at[row, column] == sample.answer
        assert len(moves) >= 2


def test_the_odd_one_lacks_what_all_others_share(samples: list[Sample]) -> None:
    for sample in of_task(samples, "odd"):
        odd = []
        for kind in ("colour", "shape"):
            counts = Counter(t[kind] for t in objects(sample))
            if sorted(counts.values()) == [1, len(objects(sample)) - 1]:
                odd += [name(t) for t in objects(sample) if counts[t[kind]] == 1]
        assert odd == [sample.answer]


def test_a_pattern_is_completed_by_its_rows_and_columns(samples: list[Sample]) -> None:
    for sample in of_task(samples, "pattern"):
        cell = next(cell for cell in CELLS if cell in sample.question)
        row, column = divmod(CELLS.index(cell), 3)
        assert cell not in {t["cell"] for t in objects(sample)}
        shared = []
        for kind in ("colour", "shape"):
            in_row = {t[kind] for t in objects(sample) if t["row"] == row}
            in_column = {t[kind] for t in objects(sample) if t["column"] == column}
            shared.append((in_row, in_column))
        (colour_row, colour_column), (shape_row, shape_column) = shared
        options = {
            f"{c} {s}"
            for colours, shapes in ((colour_row, shape_column), (colour_column, shape_row))
            if len(colours) == 1 and len(shapes) == 1
            for c in colours
            for s in shapes
        }
        assert sample.answer in options


def test_descriptions_list_the_scene_in_order(samples: list[Sample]) -> None:
    for sample in of_task(samples, "describe_scene"):
        assert sample.answer == ", ".join(name(t) for t in objects(sample))
    for sample in of_task(samples, "describe_line"):
        axis = "row" if "row" in sample.question else "column"
        names = ("top", "middle", "bottom") if axis == "row" else ("left", "center", "right")
        index = next(i for i, n in enumerate(names) if f"{n} {axis}" in sample.question)
        along = "column" if axis == "row" else "row"
        at = {t[along]: name(t) for t in objects(sample) if t[axis] == index}
        assert sample.answer == ", ".join(at.get(place, "empty") for place in range(3))


def test_probes_catch_what_is_not_there(samples: list[Sample]) -> None:
    for sample in of_task(samples, "exists"):
        asked = [pair for pair in (f"{c} {s}" for c in COLOURS for s in SHAPES) if pair in sample.question]
        there = asked[0] in {name(t) for t in objects(sample)}
        assert sample.answer == ("yes" if there else "no")
        if not there:  # the colour and the shape are there, bound to other objects
            colour, shape = asked[0].split()
            assert colour in {t["colour"] for t in objects(sample)}
            assert shape in {t["shape"] for t in objects(sample)}
    for sample in of_task(samples, "presuppose"):
        shape = next(s for s in SHAPES if s in sample.question)
        colours = [t["colour"] for t in objects(sample) if t["shape"] == shape]
        assert (colours or ["none"]) == [sample.answer]


def test_textures_are_those_of_the_objects_asked_for(samples: list[Sample]) -> None:
    for sample in of_task(samples, "texture"):
        assert [t["texture"] for t in objects(sample) if name(t) in sample.question] == [sample.answer]
    for sample in of_task(samples, "same"):
        found = [t["texture"] for t in objects(sample) if name(t) in sample.question]
        assert len(found) == 2
        assert sample.answer == ("yes" if found[0] == found[1] else "no")
    for sample in of_task(samples, "pick"):
        hits = [name(t) for t in objects(sample) if t["colour"] in words(sample) and t["texture"] in words(sample)]
        assert hits == [sample.answer]
    for sample in of_task(samples, "textured"):
        assert sample.answer == str(sum(t["texture"] in words(sample) for t in objects(sample)))


@pytest.mark.parametrize("task", ["follow", "tour"])
def test_signs_lead_from_object_to_object_to_the_answer(samples: list[Sample], task: str) -> None:
    where = {texture: MOVES[move][1:] for move, texture in SIGNS.items()}
    for sample in of_task(samples, task):
        at = {(t["row"], t["column"]): t for t in objects(sample)}
        (here,) = [place for place, thing in at.items() if name(thing) in sample.question]
        (steps,) = [int(word) for word in words(sample) if word.isdigit()]
        assert len(at) == 9  # no empty cell tells where the signs do not lead
        path = [at[here]]
        for _ in range(steps):
            down, right = where[path[-1]["texture"]]
            here = here[0] + down, here[1] + right
            path.append(at[here])
        assert sample.answer == (name(path[-1]) if task == "follow" else ", ".join(t["colour"] for t in path))


def test_what_is_computed_without_a_word_is_right(samples: list[Sample]) -> None:
    for sample in of_task(samples, "alone"):
        counts = Counter(t["colour"] for t in objects(sample))
        assert sample.answer == str(sum(count == 1 for count in counts.values()))
    for sample in of_task(samples, "differ"):
        (shape,) = [s for s in SHAPES if s in sample.question]
        colour = words(sample)[-1]
        assert sample.answer == str(sum(t["shape"] == shape and t["colour"] != colour for t in objects(sample)))
    for sample in of_task(samples, "link"):
        (here,) = [t for t in objects(sample) if name(t) in sample.question]
        for word in words(sample):
            if word in ("colour", "shape"):
                (here,) = [t for t in objects(sample) if t != here and t[word] == here[word]]
        assert sample.answer == here["cell"]
    for sample in of_task(samples, "route"):
        at = {(t["row"], t["column"]): name(t) for t in objects(sample)}
        ((row, column),) = [place for place, thing in at.items() if thing in sample.question]
        for move in [word for word in words(sample) if word in MOVES]:
            row, column = row + MOVES[move][1], column + MOVES[move][2]
        assert at[row, column] == sample.answer
    assert {sample.rationale for sample in samples if NEEDS[sample.task] == "compute"} == {""}
