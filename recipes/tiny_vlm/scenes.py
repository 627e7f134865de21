"""The questions that the tiny VLM learns from and is scored on: generated scenes in pictures of several sizes."""

import io
import random
from collections.abc import Iterable
from dataclasses import replace

from PIL import Image

from vismem.config import ScenesSource
from vismem.data.sample import Sample
from vismem.data.scenes import BACKGROUND, generate
from vismem.scope import Scope, words_of

SQUARE = 84  # pixels per side of half of the pictures
SIDES = (84, 112, 140, 168)  # of the others, width and height drawn apart; multiples of model.CELL


def questions(count: int, seed: int) -> list[Sample]:
    """`count` questions of the pretrain split, in which the last half has pictures of all sizes of SIDES."""
    rng = random.Random(f"{seed}/sizes")
    half = (count + 1) // 2
    square = of_size(half, 2 * seed, SQUARE, SQUARE)
    drawn = generate(ScenesSource(image_size=SIDES[-1]), "pretrain", 2 * seed + 1, count - half)
    return square + [resized(sample, rng.choice(SIDES), rng.choice(SIDES)) for sample in drawn]


def of_size(count: int, seed: int, width: int, height: int) -> list[Sample]:
    """`count` questions of the pretrain split in pictures of one size."""
    square = width == height == SQUARE
    drawn = generate(ScenesSource(image_size=SQUARE if square else SIDES[-1]), "pretrain", seed, count)
    return list(drawn) if square else [resized(sample, width, height) for sample in drawn]


def resized(sample: Sample, width: int, height: int) -> Sample:
    """The sample with its images stretched or shrunk to this size."""
    files = []
    for data in sample.images:
        file = io.BytesIO()
        Image.open(io.BytesIO(data)).resize((width, height), Image.Resampling.BOX).save(file, "PNG")
        files.append(file.getvalue())
    return replace(sample, images=tuple(files))


def scope_of(samples: Iterable[Sample]) -> Scope:
    """What a model that learnt from these questions reads."""
    return Scope(
        name="the tiny VLM",
        pictures="pictures of coloured shapes on a plain light ground",
        ground=BACKGROUND,
        ground_share=0.4,  # nine of the largest circles leave half
        sides=(SIDES[0], SIDES[-1]),
        words=sorted({word for sample in samples for word in words_of(sample.question)}),
    )
