"""Training sequences of the embedded base: prompt and answer as token ids, with cached image features in their places.

The images may appear a second time, as an image block after a delimiter inside the answer, as in the interleaved
documents that real vision-language models were trained on.
"""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vismem.data.sample import Sample
from vismem.generation.prompts import prompt_text, target_ids

DELIMITERS = (",", ".", ";", ":")
STRIPS = 0.6  # share of the images shown again that are strips
IGNORED = -100  # the label of what is not learnt


@dataclass(frozen=True)
class Picture:
    """Where an image's features begin in the feature table, and its height and width in visual tokens."""

    start: int
    height: int
    width: int


@dataclass(frozen=True)
class Record:
    """One question, encoded. `breaks` are the places in `target` at which an image block may stand."""

    prompt: tuple[int, ...]  # one <|image_pad|> an image, not yet widened
    target: tuple[int, ...]  # ends with <|im_end|>
    pictures: tuple[Picture, ...]
    breaks: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the whole sequence, images shown once."""
        return len(self.prompt) + len(self.target) + sum(p.height * p.width - 1 for p in self.pictures)


@dataclass(frozen=True)
class Batch:
    """R sequences, right-padded to L."""

    ids: Tensor  # (R, L)
    features: Tensor  # (R, L) row of the feature table; -1 where a token stands
    positions: Tensor  # (3, R, L) temporal, height, width
    mask: Tensor  # (R, L) 1 on tokens, 0 on padding
    labels: Tensor  # (R, L) the token that follows, where it belongs to the answer; else IGNORED


class Encoder:
    """Turns samples into records and gives every image its rows of the feature table, in the order of arrival."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.images: list[bytes] = []  # encoded files, in the order of `pictures`
        self.pictures: list[Picture] = []
        self.rows = 0
        tokenizer = processor.tokenizer
        self.delimiters = {tokenizer.convert_tokens_to_ids(mark) for mark in DELIMITERS}
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def encode(self, sample: Sample) -> Record:
        """The record of one sample."""
        pictures = tuple(self._picture(image) for image in sample.images)
        tokenizer = self.processor.tokenizer
        prompt = tokenizer(prompt_text(self.processor, sample))["input_ids"]
        target = [*target_ids(tokenizer, sample), self.end]
        breaks = [index + 1 for index, token in enumerate(target) if token in self.delimiters]
        return Record(tuple(prompt), tuple(target), pictures, (0, *breaks))

    def _picture(self, encoded: bytes) -> Picture:
        processor = self.processor.image_processor
        with Image.open(io.BytesIO(encoded)) as image:
            cell = processor.patch_size * processor.merge_size
            height, width = smart_resize(
                image.height,
                image.width,
                factor=cell,
                min_pixels=processor.size["shortest_edge"],
                max_pixels=processor.size["longest_edge"],
            )
        picture = Picture(self.rows, height // cell, width // cell)
        self.images.append(encoded)
        self.pictures.append(picture)
        self.rows += picture.height * picture.width
        return picture


def strip(places: Sequence[int], rng: random.Random) -> list[int]:
    """The image tokens of a strip, in order: at least half of `places`; where it is longer than those, some repeat.

    So a memory that starts from image tokens, more or fewer than there are, is nothing new to the base.
    """
    slots = rng.randint((len(places) + 1) // 2, 2 * len(places))
    kept = sorted(rng.sample(places, min(slots, len(places))))
    return [kept[slot * len(kept) // slots] for slot in range(slots)]


class _Row:
    """One sequence in the making."""

    def __init__(self, block: tuple[int, int, int]) -> None:
        self.block = block  # ids of <|vision_start|>, <|image_pad|>, <|vision_end|>
        self.ids: list[int] = []
        self.features: list[int] = []
        self.positions: list[tuple[int, int, int]] = []
        self.answer: list[bool] = []  # whether the token is to be learnt
        self.next = 0

    def token(self, token: int, learn: bool = False) -> None:
        self.ids.append(token)
        self.features.append(-1)
        self.positions.append((self.next,) * 3)
        self.answer.append(learn)
        self.next += 1

    def picture(self, picture: Picture) -> None:
        for index in range(picture.height * picture.width):
            row, column = divmod(index, picture.width)
            self.ids.append(self.block[1])
            self.features.append(picture.start + index)
            self.positions.append((self.next, self.next + row, self.next + column))
            self.answer.append(False)
        self.next += max(picture.height, picture.width)

    def strip(self, pictures: Sequence[Picture], line: int, rng: random.Random) -> None:
        """Some of the pictures' tokens (see `strip`), one position each, between two line breaks."""
        places = [picture.start + index for picture in pictures for index in range(picture.height * picture.width)]
        self.token(line)
        for place in strip(places, rng):
            self.token(self.block[1])
            self.features[-1] = place
        self.token(line)


def collate(
    records: Sequence[Record],
    block: tuple[int, int, int],
    padding: int,
    rng: random.Random | None,
    line: int | None = None,
) -> Batch:
    """Lay records out as one batch; with `rng`, each shows its images once more after one of its delimiters.

    With `line`, the id of the line break, it shows them after up to three delimiters, each time either as an image
    block or as a strip: some of its tokens, in reading order, on a line of their own.
    """
    rows = []
    for record in records:
        row = _Row(block)
        left = list(record.pictures)
        for token in record.prompt:
            if token == block[1]:
                row.picture(left.pop(0))
            else:
                row.token(token)
        times = 1 if line is None or rng is None else rng.randint(1, min(3, len(record.breaks)))
        again = rng.sample(record.breaks, times) if rng is not None and record.pictures else []
        for index, token in enumerate(record.target):
            if index in again and line is not None and rng is not None and rng.random() < STRIPS:
                row.strip(record.pictures, line, rng)
            elif index in again:
                for picture in record.pictures:
                    row.token(block[0])
                    row.picture(picture)
                    row.token(block[2])
            row.token(token, learn=True)
        rows.append(row)
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, features = torch.full(shape, padding), torch.full(shape, -1)
    labels, mask = torch.full(shape, IGNORED), torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(3, *shape, dtype=torch.long)
    for number, row in enumerate(rows):
        length = len(row.ids)
        ids[number, :length] = torch.tensor(row.ids)
        features[number, :length] = torch.tensor(row.features)
        positions[:, number, :length] = torch.tensor(row.positions).T
        mask[number, :length] = 1
        following = [token if learn else IGNORED for token, learn in zip(row.ids, row.answer, strict=True)]
        labels[number, : length - 1] = torch.tensor(following[1:])
    return Batch(ids, features, positions, mask, labels)
