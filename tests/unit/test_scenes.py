"""Generated scenes: what they ask is answered by what they draw, and no split shows another's images."""

import io
from collections import Counter, defaultdict
from typing import Any

import pytest
from PIL import Image

from vismem.config import ScenesSource
from vismem.data.sample import Capability, Sample
from vismem.data.scenes import generate
from vismem.data.tasks import BUILDERS, TASKS
from vismem.data.tasks.layouts import CELLS, COLOURS, HELD_OUT, SHAPES, SPLITS, TEST_ONLY
from vismem.errors import UserError

SOURCE = ScenesSource(train=780, validation=390, test=390)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Sample]]:
    return {split: list(generate(SOURCE, split, 0, 780 if split == "pretrain" else None)) for split in SPLITS}


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
    small = ScenesSource(train=26)
    first, again, other = (list(generate(small, "train", seed)) for seed in (3, 3, 4))
    assert first == again
    assert {image for sample in first for image in sample.images}.isdisjoint(
        image for sample in other for image in sample.images
    )


def test_a_longer_split_begins_with_the_shorter_one() -> None:
    short, long = (list(generate(ScenesSource(train=count), "train", 0)) for count in (13, 20))
    assert long[:13] == short


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
    assert len(TASKS) >= 9


def test_the_train_split_may_hold_some_of_the_tasks_and_the_others_stay_as_they_were() -> None:
    source = ScenesSource(train=8, validation=26, test=26)
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
            assert Image.open(io.BytesIO(image)).size == (84, 84)
    double = next(iter(generate(ScenesSource(train=1, image_size=168), "train", 0)))
    assert Image.open(io.BytesIO(double.images[0])).size == (168, 168)


def test_a_cell_is_painted_exactly_where_the_truth_has_an_object(samples: list[Sample]) -> None:
    for sample in samples[::7]:
        for encoded, scene in zip(sample.images, sample.scene_truth(), strict=True):
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
            painted = {}
            for index in range(9):
                row, column = divmod(index, 3)
                painted[row, column] = image.getpixel((28 * column + 14, 28 * row + 14))
            taken = {(thing["row"], thing["column"]): thing for thing in scene["objects"]}
            for place, pixel in painted.items():
                if place in taken:
                    assert isinstance(pixel, tuple)
                    nearest = min(
                        COLOURS, key=lambda c: sum(abs(a - b) for a, b in zip(COLOURS[c], pixel, strict=True))
                    )
                    assert nearest == taken[place]["colour"]
                else:
                    assert pixel == (245, 245, 240)


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


def test_answers_are_balanced_and_among_their_choices(samples: list[Sample]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        answers[sample.task][sample.answer] += 1
        assert not sample.choices or sample.answer in sample.choices
    for task, counts in answers.items():
        limit = {"exists": 0.6, "presuppose": 0.5, "compare": 0.4, "count": 0.35}.get(task, 0.25)
        assert max(counts.values()) <= limit * counts.total(), task
    overall = Counter(sample.answer for sample in samples)
    assert overall.most_common(1)[0][1] <= 0.1 * overall.total()


def test_pretrain_never_shows_the_held_out_pairs_and_only_test_shows_the_last(splits: dict[str, list[Sample]]) -> None:
    shown = {
        split: {(t["colour"], t["shape"]) for s in samples for scene in s.scene_truth() for t in scene["objects"]}
        for split, samples in splits.items()
    }
    assert shown["pretrain"].isdisjoint(HELD_OUT)
    assert shown["train"] & set(HELD_OUT) == shown["validation"] & set(HELD_OUT) == set(HELD_OUT) - set(TEST_ONLY)
    assert set(HELD_OUT) <= shown["test"]


def test_the_other_splits_hold_more_objects_and_wordings_than_pretrain(splits: dict[str, list[Sample]]) -> None:
    def load(split: str) -> float:
        scenes = [objects(sample) for sample in of_task(splits[split], "retrieve")]
        return sum(map(len, scenes)) / len(scenes)

    def wordings(split: str) -> set[str]:
        return {sample.question for sample in splits[split] if sample.task in ("match", "odd", "describe_scene")}

    assert load("train") > load("pretrain") + 0.5
    assert wordings("pretrain") < wordings("train") < wordings("test")


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
