"""Training sequences: prompts with their answers, inside which the images may appear again.

As in the interleaved documents that real vision-language models were trained on, and as the memories of VisMem will
appear.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismem.data.sample import Sample
from vismem.generation.prompts import encode, target_ids
from vismem.models.backbones.base import Backbone

DELIMITERS = (",", ".", ";", ":")
STRIP_SHARE = 0.6  # of the images shown again
MAX_SHOWN = 3  # times per answer
LONGEST_MEMORY = 18  # slots that a strip of few image tokens may have
IGNORED = -100  # the label of a token that is not learnt


@dataclass(frozen=True)
class Sequences:
    """R prompts with their answers, right-padded to L."""

    embeds: Tensor  # (R, L, d)
    positions: Tensor  # (3, R, L)
    mask: Tensor  # (R, L) bool
    labels: Tensor  # (R, L) the token that follows, where it belongs to the answer; else IGNORED


def lay_out(backbone: Backbone, samples: Sequence[Sample], rng: random.Random | None) -> Sequences:
    """Encode the samples; with `rng`, each shows its images again at up to MAX_SHOWN delimiters of its answer.

    It shows them either as they are in the prompt or as a strip (see `strip`).
    """
    prompt = encode(backbone, samples)
    tokenizer = backbone.processor.tokenizer
    delimiters = set(tokenizer.convert_tokens_to_ids(list(DELIMITERS)))
    line_break = tokenizer("\n")["input_ids"][0]
    rows = []
    for index, sample in enumerate(samples):
        answer = [*target_ids(tokenizer, sample), tokenizer.eos_token_id]
        visual = prompt.visual[index].nonzero().flatten().tolist()
        row = _Row(prompt.positions[:, index, : int(prompt.mask[index].sum())], visual)
        breaks = (0, *(at + 1 for at, token in enumerate(answer) if token in delimiters))
        again = rng.sample(breaks, rng.randint(1, min(MAX_SHOWN, len(breaks)))) if rng and visual else ()
        for at, token in enumerate(answer):
            if rng and at in again and rng.random() < STRIP_SHARE:
                row.strip(rng, line_break)
            elif at in again:
                row.block(backbone.image_markers)
            row.token(token, learn=True)
        rows.append(row)
    return _stack(backbone, prompt.embeds, rows)


def strip(places: Sequence[int], rng: random.Random) -> list[int]:
    """Image tokens in order, at least half of `places`; with more slots than places, some repeat.

    A memory that starts from image tokens, whether fewer or more than there are, is then nothing new to the base.
    """
    slots = rng.randint((len(places) + 1) // 2, max(len(places), LONGEST_MEMORY))
    kept = sorted(rng.sample(places, min(slots, len(places))))
    return [kept[slot * len(kept) // slots] for slot in range(slots)]


class _Row:
    """One sequence under construction: its prompt, then answer tokens and parts of the prompt again."""

    def __init__(self, positions: Tensor, visual: list[int]) -> None:
        self.prompt: list[tuple[int, int, int]] = positions.T.tolist()
        self.visual = visual  # places of the image tokens in the prompt
        self.places = list(range(len(self.prompt)))  # place in the prompt; -1 for an answer token
        self.ids = [0] * len(self.prompt)
        self.positions = list(self.prompt)
        self.learn = [False] * len(self.prompt)
        self.next = 1 + max(max(axes) for axes in self.prompt)

    def token(self, token: int, learn: bool = False) -> None:
        self._add(-1, token, (self.next,) * 3, learn)

    def block(self, markers: int) -> None:
        """The images with their markers, in the positions that they have relative to each other."""
        span = range(self.visual[0] - markers, self.visual[-1] + 1 + markers)
        shift = self.next - self.prompt[span[0]][0]
        for place in span:
            time, row, column = self.prompt[place]
            self._add(place, 0, (time + shift, row + shift, column + shift), False)

    def strip(self, rng: random.Random, line_break: int) -> None:
        """A strip of the images' tokens, one position each, between two line breaks."""
        self.token(line_break)
        for place in strip(self.visual, rng):
            self._add(place, 0, (self.next,) * 3, False)
        self.token(line_break)

    def _add(self, place: int, token: int, position: tuple[int, int, int], learn: bool) -> None:
        self.places.append(place)
        self.ids.append(token)
        self.positions.append(position)
        self.learn.append(learn)
        self.next = max(self.next, 1 + max(position))


def _stack(backbone: Backbone, prompts: Tensor, rows: Sequence[_Row]) -> Sequences:
    """The rows as one batch, embedded; `prompts` (R, prompt length, d)."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    places, ids = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    labels, mask = torch.full(shape, IGNORED), torch.zeros(shape, dtype=torch.bool)
    positions = torch.zeros(3, *shape, dtype=torch.long)
    for number, row in enumerate(rows):
        length = len(row.ids)
        places[number, :length] = torch.tensor(row.places)
        ids[number, :length] = torch.tensor(row.ids)
        positions[:, number, :length] = torch.tensor(row.positions).T
        mask[number, :length] = True
        following = [token if learn else IGNORED for token, learn in zip(row.ids, row.learn, strict=True)]
        labels[number, : length - 1] = torch.tensor(following[1:])
    shown = prompts.gather(1, places.clamp(min=0)[..., None].expand(-1, -1, prompts.shape[-1]))
    embeds = torch.where((places >= 0)[..., None], shown, backbone.embedding(ids))
    return Sequences(embeds, positions, mask, labels)
