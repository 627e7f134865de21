"""Generated scenes: what they ask is answered by what they draw, and no split shows another's images."""

import io
import random
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vismem.config import ScenesSource
from vismem.data.sample import Capability, Sample
from vismem.data.scenes import draw, generate, layouts_of
from vismem.data.tasks import BUILDERS, NEEDS, TASKS
from vismem.data.tasks.layouts import CELLS, COLOURS, MOVES, SHAPES, SIGNS, SPLITS, TEXTURES
from vismem.errors import UserError

SOURCE = ScenesSource(tasks=(), train=1380, validation=690, test=690)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Sample]]:
    return {split: list(generate(SOURCE, split, 0, 1380 if split == "pretrain" else None)) for split in SPLITS}


@pytest.fixture(scope="module")
def samples(splits: dict[str, list[Sample]]) -> list[Sample]:
    return [sample for split in splits.values() for sample in split]


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


def test_the_same_seed_gives_the_same_samples_and_another_seed_others() -> None:
    small = ScenesSource(train=46, tasks=())
    first, again, other = (list(generate(small, "train", seed)) for seed in (3, 3, 4))
    assert first == again
    assert {image for sample in first for image in sample.images}.isdisjoint(
        image for sample in other for image in sample.images
    )


def test_a_longer_split_begins_with_the_shorter_one() -> None:
    short, long = (list(generate(ScenesSource(train=count, tasks=()), "train", 0)) for count in (23, 40))
    assert long[:23] == short
    assert list(generate(ScenesSource(tasks=()), "train", 0, count=17, first=23)) == long[23:]


def test_no_image_and_no_layout_of_one_split_appears_in_another(splits: dict[str, list[Sample]]) -> None:
    images, layouts = {}, {}
    for split, samples in splits.items():
        images[split] = {image for sample in samples for image in sample.images}
        layouts[split] = {str(scene) for sample in samples for scene in sample.scene_truth()}
    for one in SPLITS:
        for other in SPLITS:
            if one != other:
                assert images[one].isdisjoint(images[other])
                assert layouts[one].isdisjoint(layouts[other])


def test_every_split_holds_all_tasks_in_equal_shares(splits: dict[str, list[Sample]]) -> None:
    for samples in splits.values():
        shares = Counter(sample.task for sample in samples)
        assert set(shares) == set(TASKS) == set(BUILDERS)
        assert len(set(shares.values())) == 1
    assert {capability for capability in TASKS.values()} == set(Capability)
    assert NEEDS.keys() == TASKS.keys()
    assert set(NEEDS.values()) == {"coarse", "detail", "compute"}


def test_the_train_split_may_hold_some_of_the_tasks_and_the_others_stay_as_they_were() -> None:
    source = ScenesSource(tasks=(), train=8, validation=46, test=46)
    half = source.model_copy(update={"train_tasks": ("count", "chain")})
    assert Counter(sample.task for sample in generate(half, "train", 0)) == {"count": 4, "chain": 4}
    for split in ("validation", "test"):
        assert list(generate(half, split, 0)) == list(generate(source, split, 0))
    with pytest.raises(UserError, match="unknown task 'juggle'"):
        next(iter(generate(ScenesSource(test=1, train_tasks=("juggle",)), "test", 0)))


def test_images_have_the_configured_size_and_as_many_as_the_truth_lists(samples: list[Sample]) -> None:
    for sample in samples[::10]:
        assert len(sample.images) == len(sample.scene_truth())
        for image in sample.images:
            assert Image.open(io.BytesIO(image)).size == (168, 168)
    small = next(iter(generate(ScenesSource(train=1, image_size=84), "train", 0)))
    assert Image.open(io.BytesIO(small.images[0])).size == (84, 84)


def test_a_cell_is_painted_exactly_where_the_truth_has_an_object(samples: list[Sample]) -> None:
    for sample in samples[::7]:
        for encoded, scene in zip(sample.images, sample.scene_truth(), strict=True):
            image = Image.open(io.BytesIO(encoded)).convert("RGB").resize((84, 84), Image.Resampling.BOX)
            taken = {(thing["row"], thing["column"]): thing for thing in scene["objects"]}
            for row, column in np.ndindex(3, 3):
                pixel = image.getpixel((28 * column + 14, 28 * row + 14))
                assert isinstance(pixel, tuple)
                if (row, column) in taken:
                    wanted = taken[row, column]["colour"]
                    assert wanted == min(COLOURS, key=lambda c: np.abs(np.subtract(COLOURS[c], pixel)).sum())
                else:
                    assert pixel == (245, 245, 240)


def test_textures_differ_in_every_object_and_nothing_of_them_is_left_at_half_the_size(samples: list[Sample]) -> None:
    for sample in samples[::60]:
        (layout, *_) = layouts_of(sample)
        shown = {}
        for texture in TEXTURES:
            dressed = tuple(replace(thing, texture=texture) for thing in layout)
            shown[texture] = Image.open(io.BytesIO(draw(dressed, 168, random.Random(0))))
        pixels = [np.asarray(image).astype(int) for image in shown.values()]
        for thing in layout:
            row, column = divmod(thing.cell, 3)
            cell = np.s_[56 * row : 56 * row + 56, 56 * column : 56 * column + 56]
            for one, other in combinations(pixels, 2):
                assert np.abs(one[cell] - other[cell]).max() >= 20
        for filter_ in (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            coarse = [np.asarray(image.resize((84, 84), filter_)).astype(int) for image in shown.values()]
            inside = [np.abs(one - coarse[0]).max(2) > 2 for one in coarse]
            assert max(map(np.mean, inside)) < 0.1, "what is left is at the objects' edges"


def test_a_drawn_layout_is_read_back_from_the_truth(samples: list[Sample]) -> None:
    for sample in samples[::40]:
        for layout, scene in zip(layouts_of(sample), sample.scene_truth(), strict=True):
            assert [(t.place, t.name, t.texture) for t in layout] == [
                (t["cell"], name(t), t["texture"]) for t in scene["objects"]
            ]


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


def test_answers_are_balanced_and_among_their_choices(samples: list[Sample]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        answers[sample.task][sample.answer] += 1
        assert not sample.choices or sample.answer in sample.choices
    limits = {
        "exists": 0.6,
        "same": 0.6,
        "presuppose": 0.5,
        "differ": 0.6,
        "compare": 0.4,
        "count": 0.35,
        "alone": 0.45,
        "textured": 0.5,
    }
    for task, counts in answers.items():
        assert max(counts.values()) <= limits.get(task, 0.3) * counts.total(), task
    overall = Counter(sample.answer for sample in samples)
    assert overall.most_common(1)[0][1] <= 0.1 * overall.total()


def test_the_texts_of_long_answers_are_long_and_name_the_next_place_as_they_go(samples: list[Sample]) -> None:
    lengths = [
        len(sample.rationale.replace(",", " ,").replace(";", " ;").split()) for sample in of_task(samples, "tour")
    ]
    assert max(lengths) >= 55
    assert min(lengths) >= 20


def test_target_words_of_the_test_split_are_all_in_pretrain(splits: dict[str, list[Sample]]) -> None:
    def vocabulary(split: str) -> set[str]:
        texts = (f"{s.question} {s.rationale} {s.answer}" for s in splits[split])
        return {word.strip(",.;:?") for text in texts for word in text.split()}

    assert vocabulary("test") - vocabulary("pretrain") == set()


def test_bad_parameters_are_named() -> None:
    with pytest.raises(UserError, match="unknown task 'juggle'"):
        next(iter(generate(ScenesSource(train=1, tasks=("juggle",)), "train", 0)))
    with pytest.raises(UserError, match="multiple of 28"):
        next(iter(generate(ScenesSource(train=1, image_size=90), "train", 0)))
