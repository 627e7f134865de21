"""easy-VQA (MIT) from its PyPI wheel: 64x64 images of one shape, simple questions, 13 answers.

The wheel has a train and a test part. Validation is one in ten of the train part's images, with all their questions.
"""

import hashlib
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

from vismem.config import EasyVqaSource
from vismem.data.sample import Capability, Sample
from vismem.errors import UserError
from vismem.files import read_json

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


def read(source: EasyVqaSource, split: str, seed: int) -> Iterator[Sample]:
    """Yield as many questions of `split` as the source asks for, drawn with `seed`.

    Raises UserError where the wheel is not installed or has fewer questions than asked for.
    """
    wanted = getattr(source, split)
    if wanted == 0:
        return
    part = _wheel_folder() / ("test" if split == "test" else "train")
    rows: list[tuple[str, str, int]] = read_json(part / "questions.json")
    ours = [n for n, row in enumerate(rows) if split == "test" or _held_out(row[2]) == (split == "validation")]
    if wanted > len(ours):
        raise UserError(
            f"prepare.sources: easy_vqa has {len(ours)} questions for {split}, {wanted} are asked for: lower `{split}`"
        )
    # A generator of its own per split, so that asking for more of one split does not change another.
    for number in random.Random(f"{seed} easy_vqa {split}").sample(ours, wanted):
        question, answer, image = rows[number]
        task, choices = _form(answer)
        yield Sample(
            id=f"easy_vqa-{part.name}-{number}",
            images=((part / "images" / f"{image}.png").read_bytes(),),
            question=question,
            answer=answer,
            choices=choices,
            task=task,
            capability=Capability.UNDERSTANDING,
            source="easy_vqa",
        )


def _wheel_folder() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("prepare.sources: easy_vqa needs the wheel `easy-vqa`: pip install easy-vqa")
    return Path(spec.origin).parent / "data"


def _held_out(image: int) -> bool:
    """Whether an image of the wheel's train part is ours for validation: the same one in ten whatever the seed."""
    return hashlib.sha256(f"easy_vqa {image}".encode()).digest()[0] < 26


def _form(answer: str) -> tuple[str, tuple[str, ...]]:
    """The task's name and the answers that the question allows."""
    if answer in COLORS:
        return "easy_vqa_color", COLORS
    if answer in SHAPES:
        return "easy_vqa_shape", SHAPES
    return "easy_vqa_exists", ("no", "yes")
