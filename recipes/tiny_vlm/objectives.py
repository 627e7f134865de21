"""The two phases in which the tiny VLM learns: first to see, then to speak about what it sees.

Vision: the vision tower and the projector learn to turn each cell of generated scenes into the sum of the (untrained)
embeddings of the words for its colour, shape, row and column; then they are frozen. Language: the language model
learns to answer; in a share of the batches the images appear again inside the answer.
"""

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from recipes.tiny_vlm.model import CELL, EMBEDDING_STD
from recipes.tiny_vlm.sequences import IGNORED, Sequences, lay_out
from vismem.data.collate import target_text
from vismem.data.sample import Sample
from vismem.data.tasks.layouts import COLOURS, COLUMNS, ROWS, SHAPES
from vismem.generation.prompts import encode
from vismem.models.backbones.base import Backbone
from vismem.training.loop import Metrics

VISION_BATCH = 64  # questions per step
CHUNK = 16  # questions of similar length in one forward pass; changes the speed, not the gradient
# What is said of a cell, by kind.
WORDS = {"colour": ("empty", *COLOURS), "shape": ("empty", *SHAPES), "row": ROWS, "column": COLUMNS}


class Vision:
    """See loop.Objective: each visual token becomes the sum of the embeddings of its cell's words, at their scale.

    (Trained as classifiers, the features collapse into a dozen directions that hardly show places, and the language
    model takes far longer to learn to look things up.)
    """

    def __init__(self, backbone: Backbone, samples: Sequence[Sample], seed: int) -> None:
        self.backbone, self.samples, self.seed = backbone, samples, seed
        self.words = [torch.stack([_embedding_of(backbone, word) for word in kind]) for kind in WORDS.values()]

    def collect(self, step: int) -> list[Sample]:
        """The questions of a step, without their text."""
        rng = random.Random(f"{self.seed}/vision/{step}")
        chosen = [replace(sample, question="") for sample in rng.choices(self.samples, k=VISION_BATCH)]
        return sorted(chosen, key=visual_tokens)

    def backward(self, batch: list[Sample]) -> Metrics:
        """Add the gradient of the mean squared error; 1.0 is as bad as no features at all."""
        tokens, total = sum(map(visual_tokens, batch)), 0.0
        for chunk in _chunks(batch):
            prompt = encode(self.backbone, chunk)
            features = prompt.embeds[prompt.visual]
            loss = (features - self._targets(chunk)).square().sum() / (tokens * features.shape[1] * EMBEDDING_STD**2)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return {"loss": total}

    def _targets(self, samples: Sequence[Sample]) -> Tensor:
        """(tokens, d) what the visual tokens of the samples should be."""
        scenes = [scene for sample in samples for scene in sample.scene_truth()]
        sizes = [grid for sample in samples for grid in grids(sample)]
        labels = torch.cat([cell_labels(scene, *grid) for scene, grid in zip(scenes, sizes, strict=True)])
        summed: Tensor = torch.stack([kind[labels[:, index]] for index, kind in enumerate(self.words)]).sum(0)
        return summed / math.sqrt(len(self.words))


@dataclass
class Language:
    """See loop.Objective: the mean cross-entropy of the answers' tokens."""

    backbone: Backbone
    samples: Sequence[Sample]
    seed: int
    batch_size: int
    interleave: float  # share of the batches that show the images again

    def collect(self, step: int) -> tuple[list[Sample], random.Random | None]:
        """The questions of a step and, where their images appear again, the generator that says how."""
        rng = random.Random(f"{self.seed}/language/{step}")
        chosen = sorted(rng.choices(self.samples, k=self.batch_size), key=_length)
        return chosen, rng if rng.random() < self.interleave else None

    def backward(self, batch: tuple[list[Sample], random.Random | None]) -> Metrics:
        """Add the gradient of the mean over the batch."""
        samples, rng = batch
        chunks = [lay_out(self.backbone, chunk, rng) for chunk in _chunks(samples)]
        learnt = sum(int((chunk.labels != IGNORED).sum()) for chunk in chunks)
        total = 0.0
        for chunk in chunks:
            loss = answer_loss(self.backbone, chunk) / learnt
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return {"loss": total}


def answer_loss(backbone: Backbone, batch: Sequences) -> Tensor:
    """Summed cross-entropy of the answers' tokens."""
    length = batch.mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    hidden = backbone.language(batch.embeds, batch.positions, causal & batch.mask[:, None, None, :])
    learnt = batch.labels != IGNORED
    loss: Tensor = nn.functional.cross_entropy(backbone.head(hidden[learnt]), batch.labels[learnt], reduction="sum")
    return loss


def cell_labels(scene: dict[str, Any], height: int, width: int) -> Tensor:
    """(tokens, 4) indices into WORDS of the cell in which the centre of each visual token lies."""
    at = {(thing["row"], thing["column"]): thing for thing in scene["objects"]}
    rows = []
    for index in range(height * width):
        row, column = (2 * (index // width) + 1) * 3 // (2 * height), (2 * (index % width) + 1) * 3 // (2 * width)
        here = {"row": ROWS[row], "column": COLUMNS[column]}
        thing = {"colour": "empty", "shape": "empty", **at.get((row, column), {}), **here}
        rows.append([values.index(thing[name]) for name, values in WORDS.items()])
    return torch.tensor(rows)


def grids(sample: Sample) -> list[tuple[int, int]]:
    """Height and width of each image in visual tokens; sides are multiples of CELL."""
    sizes = [Image.open(io.BytesIO(image)).size for image in sample.images]
    return [(height // CELL, width // CELL) for width, height in sizes]


def visual_tokens(sample: Sample) -> int:
    """Visual tokens of all images of a sample."""
    return sum(height * width for height, width in grids(sample))


def _length(sample: Sample) -> int:
    """About the tokens of prompt and answer: a word and the space behind it are five to six letters long."""
    return visual_tokens(sample) + (len(sample.question) + len(target_text(sample))) // 6


def _chunks(samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    return [samples[start : start + CHUNK] for start in range(0, len(samples), CHUNK)]


def _embedding_of(backbone: Backbone, word: str) -> Tensor:
    """(d,) the embedding of the word inside a sentence; where it is several tokens, their sum at the same scale."""
    ids = backbone.processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    rows: Tensor = backbone.embedding.weight.detach()[ids]
    summed: Tensor = rows.sum(0) / len(ids) ** 0.5
    return summed
