"""Training sequences: prompts with their answers, inside which the images may appear again.

As in the interleaved documents that real vision-language models were trained on, and as the memories of VisMem will
appear.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

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
        # Of each token: 1 + its place in the prompt, or 0 for one of the answer; id; whether it is learnt; position.
        self.tokens: list[tuple[int, ...]] = [(1 + at, 0, 0, *axes) for at, axes in enumerate(self.prompt)]
        self.next = 1 + max(max(axes) for axes in self.prompt)

    def token(self, token: int, learn: bool = False) -> None:
        self.tokens.append((0, token, learn, *(self.next,) * 3))
        self.next += 1

    def block(self, markers: int) -> None:
        """The images with their markers, in the positions that they have relative to each other."""
        span = range(self.visual[0] - markers, self.visual[-1] + 1 + markers)
        shift = self.next - self.prompt[span[0]][0]
        for place in span:
            position = [axis + shift for axis in self.prompt[place]]
            self.tokens.append((1 + place, 0, 0, *position))
            self.next = max(self.next, 1 + max(position))

    def strip(self, rng: random.Random, line_break: int) -> None:
        """A strip of the images' tokens, one position each, between two line breaks."""
        self.token(line_break)
        for place in strip(self.visual, rng):
            self.tokens.append((1 + place, 0, 0, *(self.next,) * 3))
            self.next += 1
        self.token(line_break)


def _stack(backbone: Backbone, prompts: Tensor, rows: Sequence[_Row]) -> Sequences:
    """The rows as one batch, embedded; `prompts` (R, prompt length, d)."""
    table = pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True, padding_value=-1)
    mask = table[..., 0] >= 0
    place, ids, learn, *positions = table.clamp(min=0).unbind(-1)
    labels = pad(ids.where(learn.bool(), IGNORED)[:, 1:], (0, 1), value=IGNORED)
    shown = prompts.gather(1, (place - 1).clamp(min=0)[..., None].expand(-1, -1, prompts.shape[-1]))
    embeds = torch.where((place > 0)[..., None], shown, backbone.embedding(ids))
    return Sequences(embeds, torch.stack(positions), mask, labels)
