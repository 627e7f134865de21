"""What a base says that it reads, and the doubts about anything else."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from recipes.tiny_vlm.model import MAX_PIXELS, MIN_PIXELS
from recipes.tiny_vlm.scenes import questions, scope_of
from vismem.config import Config
from vismem.init.bases import Base
from vismem.runtime.chat import MARK
from vismem.runtime.images import size_after_resizing
from vismem.scope import Scope
from vismem.shipped import shipped
from vismem.training.base import base

IMAGES = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
GROUND = (245, 245, 240)


@pytest.fixture(scope="module")
def scope() -> Scope:
    found = Scope.read(shipped("assets/tiny-vlm"))
    assert found is not None
    return found


def doubts(
    scope: Scope, width: int, height: int, question: str = "what is at the top left?", colour=GROUND
) -> list[str]:  # type: ignore[no-untyped-def]
    seen = size_after_resizing((width, height), IMAGES)
    return list(scope.doubts([Image.new("RGB", (width, height), colour)], [seen], question))


def test_the_asset_s_scope_is_the_recipe_s(scope: Scope) -> None:
    made = scope_of(questions(2000, seed=0))
    assert (list(made.sides), list(made.ground), made.pictures) == (scope.sides, scope.ground, scope.pictures)
    assert list(made.words) == scope.words


@pytest.mark.parametrize("size", [(84, 84), (112, 112), (28, 28), (168, 168), (672, 672)])
def test_pictures_that_it_sees_as_it_learnt_raise_no_doubt(scope: Scope, size: tuple[int, int]) -> None:
    assert doubts(scope, *size) == []


@pytest.mark.parametrize(
    ("size", "seen"), [((640, 320), "224 x 112"), ((112, 336), "84 x 280"), ((168, 84), "168 x 84")]
)
def test_a_picture_that_is_not_square_is_named_with_what_becomes_of_it(
    scope: Scope, size: tuple[int, int], seen: str
) -> None:
    (said,) = doubts(scope, *size)
    assert f"this {size[0]} x {size[1]} image is resized to {seen}: its answer means nothing" in said
    width, height = size_after_resizing(size, IMAGES)
    pixels = IMAGES(Image.new("RGB", size), return_tensors="np")["image_grid_thw"][0]
    assert [1, height // 14, width // 14] == list(pixels)


def test_a_picture_of_something_else_is_named(scope: Scope) -> None:
    (said,) = doubts(scope, 84, 84, colour=(90, 120, 60))
    assert said.startswith("the tiny VLM was trained on pictures of coloured shapes on a plain light ground")


def test_unknown_words_are_named(scope: Scope) -> None:
    (said,) = doubts(scope, 84, 84, "How many cups, red circles are there?")
    assert "unknown words: 'How', 'cups' (the tiny VLM knows 94 lower-case words): its answer" in said


def test_scenes_of_every_split_raise_no_doubt(scope: Scope) -> None:
    for sample in tiny.samples():
        images = [Image.open(io.BytesIO(data)) for data in sample.images]
        seen = [size_after_resizing(image.size, IMAGES) for image in images]
        assert list(scope.doubts(images, seen, sample.question)) == []


def test_a_base_without_a_scope_raises_none_and_the_step_keeps_one(
    scope: Scope, tiny_base: Path, tmp_path: Path
) -> None:
    assert Scope.read(tiny_base) is None
    base(Config(), {}, tmp_path)
    assert Scope.read(tmp_path) == scope


def test_marks_of_images_and_half_a_character_are_no_words(scope: Scope) -> None:
    sample, known = tiny.samples()[0], Base("tiny", small=True, processor=IMAGES, scope=scope)
    marks = MARK * len(sample.images)
    assert known.doubts(replace(sample, question=f"{marks}{sample.question}")) == []
    assert known.doubts(replace(sample, question=f"{sample.question} \ud800")) == []
