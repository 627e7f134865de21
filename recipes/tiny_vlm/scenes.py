"""The questions that the tiny VLM learns from and is scored on: generated scenes in pictures of several sizes."""

import os
import random
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

from vismem.config import ScenesSource
from vismem.data.sample import Sample
from vismem.data.scenes import BACKGROUND, draw, generate, layouts_of
from vismem.scope import Scope, words_of

SIDE = 168  # pixels of three quarters of the pictures, which are all square
SIDES = (84, 112, 140, 168)  # of the others; multiples of model.CELL
BLOCK = 500  # questions that a process draws at a time


def questions(count: int, seed: int) -> list[Sample]:
    """`count` questions of the pretrain split, of which every fourth block of BLOCK has pictures of all SIDES."""
    blocks = [(first, min(BLOCK, count - first)) for first in range(0, count, BLOCK)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return [sample for block in pool.map(partial(_block, seed), *zip(*blocks, strict=True)) for sample in block]


def _block(seed: int, first: int, count: int) -> list[Sample]:
    rng = random.Random(f"{seed}/sizes/{first}")
    drawn = generate(ScenesSource(image_size=SIDE, tasks=()), "pretrain", seed, count, first)
    if first // BLOCK % 4:
        return list(drawn)
    return [redrawn(sample, rng.choice(SIDES), rng) for sample in drawn]


def of_size(count: int, seed: int, side: int) -> list[Sample]:
    """`count` questions of the pretrain split in pictures of one size."""
    rng = random.Random(f"{seed}/{side}")
    drawn = generate(ScenesSource(image_size=SIDE, tasks=()), "pretrain", seed, count)
    return [redrawn(sample, side, rng) for sample in drawn]


def redrawn(sample: Sample, side: int, rng: random.Random) -> Sample:
    """The sample with its scenes drawn in this many pixels a side."""
    return replace(sample, images=tuple(draw(layout, side, rng) for layout in layouts_of(sample)))


def scope_of(samples: Iterable[Sample]) -> Scope:
    """What a model that learnt from these questions reads."""
    return Scope(
        name="the tiny VLM",
        pictures="pictures of coloured shapes on a plain light ground",
        ground=BACKGROUND,
        ground_share=0.4,  # nine of the largest circles leave half
        sides=(SIDES[0], SIDES[-1]),
        square=True,
        words=sorted({word for sample in samples for word in words_of(sample.question)}),
    )
