"""Training sequences: prompts with their answers, inside which the images may appear again, whole.

As in the interleaved documents that real vision-language models were trained on, and as the memories of VisMem will
appear: in the middle of an answer, a few vectors at a time.
"""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from recipes.tiny_vlm.model import CELL
from vismem.data.sample import Sample
from vismem.data.scenes import layouts_of
from vismem.data.tasks import NEEDS
from vismem.generation.prompts import encode, prompt_text, target_ids
from vismem.models.backbones.base import Backbone, Prompt

DELIMITERS = (",", ".", ";", ":")
WHOLE_SHARE = 0.25  # of the prompts that show whole images
PLAIN_SHARE = 0.4  # of the answers in which nothing is shown again
OFTEN = (0.15, 0.4, 0.8)  # of the others: the chance of a look at the answer's start and at each delimiter
BLOCK_SHARE = 0.2  # of the looks that show the images as they are, the others being strips
FIRST_BLOCK_SHARE = 0.6  # the same, of the looks at the start of answers that need one
MAX_SHOWN = 8  # looks in an answer
SLOTS = (4, 18)  # of a strip, the smallest and largest number
SCATTERED_SHARE = 0.3  # of the strips that show tokens from anywhere, the others showing some objects' tokens
ENCODED = 128  # questions at a time
IGNORED = -100  # the label of a token that is not learnt

# Of each token of a sequence: 1 + its place in the features, or 0 for a word; id; whether it is learnt; position.
Table = NDArray[np.int32]  # (L, 6)


@dataclass(frozen=True)
class Page:
    """One question, ready to be laid out."""

    coarse: Table  # the prompt with coarse images
    whole: Table  # the prompt with whole images
    block: slice  # of `whole`: the images with their markers
    images: NDArray[np.int64]  # places in the features of the whole images' tokens
    objects: tuple[NDArray[np.int64], ...]  # for each object, those of its cell
    answer: Table  # positions counted from 0
    breaks: tuple[int, ...]  # the answer's start, after each of its delimiters, and its end
    line_break: int  # the token that opens and closes a strip
    need: str  # see vismem.data.tasks; only the whole images answer what needs "detail"


@dataclass(frozen=True)
class Sequences:
    """R prompts with their answers, right-padded to L."""

    embeds: Tensor  # (R, L, d)
    positions: Tensor  # (3, R, L)
    mask: Tensor  # (R, L) bool
    labels: Tensor  # (R, L) the token that follows, where it belongs to the answer; else IGNORED


@torch.no_grad()
def pages(backbone: Backbone, samples: Sequence[Sample]) -> tuple[list[Page], Tensor]:
    """Every question as a page, and the features (V, d) of the image tokens that the pages show, coarse and whole."""
    tokenizer = backbone.processor.tokenizer
    delimiters = set(tokenizer.convert_tokens_to_ids(list(DELIMITERS)))
    line_break = tokenizer("\n")["input_ids"][0]
    pad_id = backbone.model.config.image_token_id
    made, features, count = list[Page](), list[Tensor](), 0
    for start in range(0, len(samples), ENCODED):
        batch = samples[start : start + ENCODED]
        views = encode(backbone, batch), encode(backbone, batch, whole=True)
        for row, sample in enumerate(batch):
            ids = tokenizer(prompt_text(backbone.processor, sample), add_special_tokens=False)["input_ids"]
            text = [token for token in ids if token != pad_id]
            tables = []
            for view in views:
                tables.append(prompt_table(view, row, text, count))
                features.append(view.embeds[row][view.visual[row]])
                count += len(features[-1])
            coarse, whole = tables
            places = whole[:, 0].nonzero()[0]
            first = count - len(places)
            answer = [*target_ids(tokenizer, sample), tokenizer.eos_token_id]
            made.append(
                Page(
                    coarse,
                    whole,
                    block=slice(places[0] - backbone.image_markers, places[-1] + 1 + backbone.image_markers),
                    images=np.arange(first, count),
                    objects=tuple(first + tokens for tokens in object_tokens(sample)),
                    answer=word_table(answer, learnt=True),
                    breaks=(0, *(at + 1 for at, token in enumerate(answer[:-1]) if token in delimiters), len(answer)),
                    line_break=line_break,
                    need=NEEDS[sample.task],
                )
            )
    return made, torch.cat(features)


def lay_out(page: Page, rng: random.Random | None, answerable: bool = False) -> Table:
    """The question with its answer; with `rng`, in one of the ways of the constants above, else coarse and plain.

    `answerable`: what needs detail is asked with the whole images in the prompt or a look at the answer's start.
    """
    whole = rng is not None and rng.random() < WHOLE_SHARE
    often = 0.0 if rng is None or rng.random() < PLAIN_SHARE else rng.choice(OFTEN)
    prompt = page.whole if whole else page.coarse
    parts, following, shown = [prompt], 1 + int(prompt[:, 3:].max()), 0
    for first, last in pairwise(page.breaks):
        looks = [page.answer[first:last]]
        needed = answerable and page.need == "detail" and not whole and first == 0
        if rng is not None and shown < MAX_SHOWN and (needed or rng.random() < often):
            share = FIRST_BLOCK_SHARE if needed else BLOCK_SHARE
            looks.insert(0, page.whole[page.block] if rng.random() < share else _strip(page, rng))
            shown += 1
        for part in looks:
            moved = part.copy()
            moved[:, 3:] += following - part[0, 3:]
            parts.append(moved)
            following = 1 + int(moved[:, 3:].max())
    return np.concatenate(parts)


def stack(backbone: Backbone, features: Tensor, tables: Sequence[Table]) -> Sequences:
    """The sequences as one batch, embedded."""
    rows = pad_sequence([torch.from_numpy(table) for table in tables], batch_first=True, padding_value=-1)
    rows = rows.to(features.device).long()
    mask = rows[..., 0] >= 0
    place, ids, learnt, *positions = rows.clamp(min=0).unbind(-1)
    labels = pad(ids.where(learnt.bool(), IGNORED)[:, 1:], (0, 1), value=IGNORED)
    words = backbone.embedding(ids)
    embeds = torch.where((place > 0)[..., None], features[(place - 1).clamp(min=0)].to(words.dtype), words)
    return Sequences(embeds, torch.stack(positions), mask, labels)


def object_tokens(sample: Sample) -> list[NDArray[np.int64]]:
    """For each object of a sample, which tokens of all its whole images in order have their centres in its cell."""
    found, before = [], 0
    for (height, width), layout in zip(grids(sample), layouts_of(sample), strict=True):
        cells = cells_of(height, width)
        found += [before + (cells == thing.cell).nonzero()[0] for thing in layout]
        before += height * width
    return found


def grids(sample: Sample) -> list[tuple[int, int]]:
    """Height and width of each whole image in visual tokens; sides are multiples of CELL."""
    sizes = [Image.open(io.BytesIO(image)).size for image in sample.images]
    return [(height // CELL, width // CELL) for width, height in sizes]


def cells_of(height: int, width: int) -> NDArray[np.int64]:
    """(tokens) the cell in which the centre of each token of an image lies."""
    row, column = (np.arange(side) * 2 + 1 for side in (height, width))
    return (3 * (row * 3 // (2 * height))[:, None] + column * 3 // (2 * width)).reshape(-1)


def prompt_table(view: Prompt, row: int, text: Sequence[int], before: int) -> Table:
    """One prompt of a view; its image tokens' features come after `before` others, its other tokens are `text`."""
    length = int(view.mask[row].sum())
    visual = view.visual[row, :length].cpu().numpy()
    table = np.zeros((length, 6), dtype=np.int32)
    table[visual, 0] = 1 + before + np.arange(visual.sum())
    table[~visual, 1] = text
    table[:, 3:] = view.positions[:, row, :length].T.cpu().numpy()
    return table


def word_table(ids: Sequence[int], learnt: bool = False) -> Table:
    """Words one after the other, their positions counted from 0."""
    table = np.zeros((len(ids), 6), dtype=np.int32)
    table[:, 1], table[:, 2], table[:, 3:] = ids, learnt, np.arange(len(ids))[:, None]
    return table


def _strip(page: Page, rng: random.Random) -> Table:
    """Some of the whole images' tokens, one position each, between two line breaks.

    With more slots than tokens, some repeat, so that a memory of any length is nothing new to the base.
    """
    slots = rng.randint(*SLOTS)
    if rng.random() < SCATTERED_SHARE:
        kept = rng.sample(page.images.tolist(), rng.randint(1, min(slots, len(page.images))))
    else:
        chosen = rng.sample(page.objects, rng.randint(1, min(4, len(page.objects))))
        kept = np.concatenate(chosen).tolist()
        kept = rng.sample(kept, min(slots, len(kept)))
    kept.sort()
    table = word_table([page.line_break] * (slots + 2))
    table[1:-1, 0] = [1 + kept[slot * len(kept) // slots] for slot in range(slots)]
    return table
