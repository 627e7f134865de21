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
from vismem.data.tasks.layouts import COLOURS, SPLITS, TEXTURES
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


def test_target_words_of_the_test_split_are_all_in_pretrain(splits: dict[str, list[Sample]]) -> None:
    def vocabulary(split: str) -> set[str]:
        texts = (f"{s.question} {s.rationale} {s.answer}" for s in splits[split])
        return {word.strip(",.;:?") for text in texts for word in text.split()}

    assert vocabulary("test") - vocabulary("pretrain") == set()


def test_bad_parameters_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown task 'juggle'"):
        next(iter(generate(ScenesSource(train=1, tasks=("juggle",)), "train", 0)))
    with pytest.raises(UserError, match="multiple of 28"):
        next(iter(generate(ScenesSource(train=1, image_size=90), "train", 0)))
    with pytest.raises(UserError, match="max_objects 1, which is 2 to 9"):
        next(iter(generate(ScenesSource(train=1, min_objects=1, max_objects=1), "train", 0)))
    monkeypatch.setitem(BUILDERS, "tour", lambda world: None)
    with pytest.raises(UserError, match="task 'tour' finds nothing to ask in scenes of 4 to 7 objects"):
        next(iter(generate(ScenesSource(train=1, tasks=("tour",)), "train", 0)))
