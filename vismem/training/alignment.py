"""Joins a new vision tower to a pretrained language model, for families whose encoder sees square tiles.

Phase "vision": tower and projector learn to name the cells of generated scenes in the language model's own word
embeddings, as in `pretraining`. Phase "language": with the tower frozen, the projector and the whole language model
learn the pretrain split; in a share of the batches the images appear again inside the answer.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismem.config import BaseConfig
from vismem.data.collate import target_text
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.generation.prompts import encode, target_ids
from vismem.models.backbones.base import VisionInput
from vismem.models.backbones.tiles import TiledBackbone
from vismem.training.pretraining import CHUNK, VISION_BATCH, Phase, cell_labels, cell_targets, cell_words, run_phase
from vismem.training.sequences import DELIMITERS, IGNORED, STRIPS, Picture, strip

# --- vision ----------------------------------------------------------------------------------------------------------


def train_tower(
    backbone: TiledBackbone, samples: Sequence[Sample], config: BaseConfig, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """Train tower and projector on the samples' scenes; return the loss curve (1.0: no better than the mean word).

    UserError where no sample knows its scene.
    """
    seen = [pair for sample in samples for pair in zip(sample.images, sample.scene_truth() or (), strict=False)]
    if not seen:
        raise UserError(
            "base.model 'small' learns to see from generated scenes, and the pretrain split has none: "
            "give prepare.sources a 'scenes' source with pretrain > 0"
        )
    words = cell_words(backbone)
    spread = float(sum(kind.var(0).mean() for kind in words)) / len(words)

    def backward_at(step: int) -> float:
        rng = random.Random(f"{seed}/vision/{step}")
        chosen = [rng.choice(seen) for _ in range(VISION_BATCH)]
        features = tile_features(backbone, [image for image, _ in chosen])
        side = math.isqrt(features.shape[1])
        labels = torch.stack([cell_labels(scene, Picture(0, side, side)) for _, scene in chosen])
        wanted = cell_targets(words, labels.to(features.device))
        loss = nn.functional.mse_loss(features, wanted) / spread
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    module = nn.ModuleDict({"tower": backbone.tower, "projector": backbone.projector})
    phase = Phase("vision", config.vision_steps, config.learning_rate, folder, config.matrix_learning_rate)
    return run_phase(phase, module, backward_at)


def tile_features(backbone: TiledBackbone, images: Sequence[bytes]) -> Tensor:
    """(images, n, d) features of each image's first tile, which shows all of it, row by row; with gradient."""
    with torch.no_grad():
        vision = encode(backbone, [Sample("", (image,), question="", answer="") for image in images]).vision
    whole = vision.image[0] == 0
    first = VisionInput(*(getattr(vision, name)[:, whole] for name in ("patches", "positions", "image", "window")))
    return backbone.project(backbone.patch_stream(first).hidden)


# --- language --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """R prompts with their answers, right-padded to L."""

    embeds: Tensor  # (R, L, d)
    positions: Tensor  # (3, R, L)
    mask: Tensor  # (R, L) bool
    labels: Tensor  # (R, L) the token that follows, where it belongs to the answer; else IGNORED


def train_language(
    backbone: TiledBackbone, samples: Sequence[Sample], config: BaseConfig, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """Train everything but the vision tower on the samples, AdamW at `language_rate`. Returns the loss curve."""
    backbone.tower.requires_grad_(False)
    tokenizer = backbone.processor.tokenizer

    def backward_at(step: int) -> float:
        rng = random.Random(f"{seed}/language/{step}")
        chosen = [rng.choice(samples) for _ in range(config.batch_size)]
        chosen.sort(key=lambda sample: (len(sample.images), len(sample.question) + len(target_text(sample))))
        answers = [answer_ids(tokenizer, sample) for sample in chosen]
        learnt = sum(map(len, answers))
        again = rng if rng.random() < config.interleave else None
        total = 0.0
        for at in range(0, len(chosen), CHUNK):
            batch = lay_out(backbone, chosen[at : at + CHUNK], answers[at : at + CHUNK], again)
            loss = answer_loss(backbone, batch) / learnt
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    return run_phase(Phase("language", config.steps, config.language_rate, folder), backbone.model, backward_at)


def answer_ids(tokenizer: Any, sample: Sample) -> list[int]:
    """The reference answer as token ids, the end of the turn included."""
    return [*target_ids(tokenizer, sample), tokenizer.eos_token_id]


def answer_loss(backbone: TiledBackbone, batch: Sequences) -> Tensor:
    """Summed cross-entropy of the answers' tokens."""
    length = batch.mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=batch.mask.device).tril()
    hidden = backbone.language(batch.embeds, batch.positions, causal & batch.mask[:, None, None, :])
    learnt = batch.labels != IGNORED
    logits = backbone.head(hidden[learnt]).float()
    loss: Tensor = nn.functional.cross_entropy(logits, batch.labels[learnt], reduction="sum")
    return loss


def lay_out(
    backbone: TiledBackbone, samples: Sequence[Sample], answers: Sequence[list[int]], rng: random.Random | None
) -> Sequences:
    """Prompts with answers behind them; with `rng`, each shows its images again after up to three delimiters.

    It shows them as they stand in the prompt, or as a strip: some of their tokens on a line, one position each,
    as latents will stand.
    """
    prompt = encode(backbone, samples)
    tokenizer = backbone.processor.tokenizer
    delimiters = set(tokenizer.convert_tokens_to_ids(list(DELIMITERS)))
    line = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    rows = []
    for index, answer in enumerate(answers):
        length = int(prompt.mask[index].sum())
        visual = prompt.visual[index].nonzero().flatten().tolist()
        row = _Row(prompt.positions[:, index, :length].T.tolist(), visual, backbone.image_markers, line)
        breaks = (0, *(at + 1 for at, token in enumerate(answer) if token in delimiters))
        again = rng.sample(breaks, rng.randint(1, min(3, len(breaks)))) if rng is not None and visual else []
        for at, token in enumerate(answer):
            if at in again and rng is not None:
                row.strip(rng) if rng.random() < STRIPS else row.block()
            row.token(token, learn=True)
        rows.append(row)
    return _stack(backbone, prompt.embeds, rows)


class _Row:
    """One sequence in the making: its prompt, then tokens, and places of the prompt once more."""

    def __init__(self, positions: list[tuple[int, int, int]], visual: list[int], markers: int, line: int) -> None:
        self.prompt, self.visual, self.markers, self.line = positions, visual, markers, line
        self.places = list(range(len(positions)))  # place in the prompt; -1: a token
        self.ids = [0] * len(positions)
        self.positions = list(positions)
        self.learn = [False] * len(positions)
        self.next = 1 + max(max(axes) for axes in positions)

    def token(self, token: int, learn: bool = False) -> None:
        self._add(-1, token, (self.next,) * 3, learn)

    def block(self) -> None:
        """The images with their markers, in the positions that they have among themselves."""
        span = range(self.visual[0] - self.markers, self.visual[-1] + 1 + self.markers)
        shift = self.next - self.prompt[span[0]][0]
        for place in span:
            time, row, column = self.prompt[place]
            self._add(place, 0, (time + shift, row + shift, column + shift), False)

    def strip(self, rng: random.Random) -> None:
        """Some of the images' tokens (see `sequences.strip`) between two line breaks."""
        self.token(self.line)
        for place in strip(self.visual, rng):
            self._add(place, 0, (self.next,) * 3, False)
        self.token(self.line)

    def _add(self, place: int, token: int, position: tuple[int, int, int], learn: bool) -> None:
        self.places.append(place)
        self.ids.append(token)
        self.positions.append(position)
        self.learn.append(learn)
        self.next = max(self.next, 1 + max(position))


def _stack(backbone: TiledBackbone, prompts: Tensor, rows: Sequence[_Row]) -> Sequences:
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
    device = backbone.device
    places, ids = places.to(device), ids.to(device)
    width = prompts.shape[-1]
    shown = prompts.gather(1, places.clamp(min=0)[..., None].expand(-1, -1, width))
    embeds = torch.where((places >= 0)[..., None], shown, backbone.embedding(ids))
    return Sequences(embeds, positions.to(device), mask.to(device), labels.to(device))
