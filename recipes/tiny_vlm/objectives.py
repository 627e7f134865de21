"""The two phases in which the tiny VLM learns: first to see, then to speak about what it sees.

Vision: the vision tower and the projector learn to turn each cell of generated scenes into the sum of the (untrained)
embeddings of the words for its colour, shape, texture, row and column; then they are frozen. Language: the language
model learns to answer, mostly from coarse images, and in a share of the answers the whole images appear again; at the
end of it, more often where they are needed, and with more of the questions that take longest to learn.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor, nn

from recipes.tiny_vlm.model import CELL, EMBEDDING_STD
from recipes.tiny_vlm.sequences import IGNORED, Page, Sequences, Table, cells_of, grids, lay_out, stack
from vismem.data.sample import Sample
from vismem.data.scenes import layouts_of
from vismem.data.tasks.layouts import COLOURS, COLUMNS, ROWS, SHAPES, TEXTURES, Layout
from vismem.generation.prompts import encode
from vismem.models.backbones.base import Backbone
from vismem.runtime.images import coarse_grid
from vismem.training.loop import Metrics

VISION_BATCH = 64  # questions per step
CHUNK = {"cpu": 16, "cuda": 96}  # questions of similar length in one forward pass; the speed, not the gradient
# What is said of a cell, by kind.
WORDS = {
    "colour": ("empty", *COLOURS),
    "shape": ("empty", *SHAPES),
    "texture": TEXTURES,
    "row": ROWS,
    "column": COLUMNS,
}
T = TypeVar("T")
NOTHING = -1  # the label of a kind that is not to be said


class Vision:
    """See loop.Objective: each visual token becomes the sum of the embeddings of its cell's words, at their scale.

    Every other step shows coarse images, of whose textures nothing is left and nothing is to be said.
    (Trained as classifiers, the features collapse into a dozen directions that hardly show places, and the language
    model takes far longer to learn to look things up.)
    """

    def __init__(self, backbone: Backbone, samples: Sequence[Sample], seed: int) -> None:
        self.backbone, self.samples, self.seed = backbone, samples, seed
        self.words = [torch.stack([embedding_of(backbone, word) for word in kind]) for kind in WORDS.values()]

    def collect(self, step: int) -> tuple[list[Sample], bool]:
        """The questions of a step, without their text, and whether their images are shown whole."""
        rng = random.Random(f"{self.seed}/vision/{step}")
        chosen = [replace(sample, question="") for sample in rng.choices(self.samples, k=VISION_BATCH)]
        return sorted(chosen, key=visual_tokens), step % 2 == 0

    def backward(self, batch: tuple[list[Sample], bool]) -> Metrics:
        """Add the gradient of the mean squared error; 1.0 is as bad as no features at all."""
        samples, whole = batch
        targets = [self._targets(chunk, whole) for chunk in _chunks(samples, self.backbone.device)]
        count, total = sum(map(Tensor.numel, targets)), 0.0
        for chunk, target in zip(_chunks(samples, self.backbone.device), targets, strict=True):
            prompt = encode(self.backbone, chunk, whole)
            loss = (prompt.embeds[prompt.visual] - target).square().sum() / (count * EMBEDDING_STD**2)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return {"loss": total}

    def _targets(self, samples: Sequence[Sample], whole: bool) -> Tensor:
        """(tokens, d) what the visual tokens of the samples should be."""
        labels = torch.cat([self._labels(sample, whole) for sample in samples]).to(self.backbone.device)
        said = (
            kind[label.clamp(min=0)] * (label != NOTHING)[:, None]
            for kind, label in zip(self.words, labels.unbind(1), strict=True)
        )
        return torch.stack([*said]).sum(0) / 2

    def _labels(self, sample: Sample, whole: bool) -> Tensor:
        """(tokens, 5) `cell_labels` of the images as they are shown."""
        found = []
        for grid, layout in zip(grids(sample), layouts_of(sample), strict=True):
            shown = grid if whole else shown_grid(grid, self.backbone.prompt_pixels)
            found.append(cell_labels(layout, *shown, textures=shown == grid))
        return torch.cat(found)


@dataclass
class Language:
    """See loop.Objective: the mean cross-entropy of the answers' tokens.

    `shares`: of the questions drawn, by what they need; the others share the rest. Where detail has one, it is asked so
    that it can be answered.
    """

    backbone: Backbone
    pages: Sequence[Page]
    features: Tensor  # that the pages show
    seed: int
    batch_size: int
    phase: str = "language"  # names its draws
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = Counter(page.need for page in self.pages)
        others = sum(count[need] for need in count if need not in self.shares)
        each = (1 - sum(self.shares.values())) / max(others, 1)  # of the others
        weights = {need: share / each / count[need] for need, share in self.shares.items()}
        self.weights = list(accumulate(weights.get(page.need, 1.0) for page in self.pages))

    def collect(self, step: int) -> list[Table]:
        """The sequences of a step, by length."""
        rng = random.Random(f"{self.seed}/{self.phase}/{step}")
        drawn = rng.choices(self.pages, cum_weights=self.weights, k=self.batch_size)
        return sorted((lay_out(page, rng, "detail" in self.shares) for page in drawn), key=len)

    def backward(self, batch: list[Table]) -> Metrics:
        """Add the gradient of the mean over the batch's tokens."""
        learnt = sum(int(table[:, 2].sum()) for table in batch)
        total = torch.zeros((), device=self.features.device)
        for chunk in _chunks(batch, self.features.device):
            loss = answer_loss(self.backbone, stack(self.backbone, self.features, chunk)) / learnt
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return {"loss": float(total)}


def answer_loss(backbone: Backbone, batch: Sequences, read: Tensor | None = None) -> Tensor:
    """Summed cross-entropy of the answers' tokens; `read` (R, L, L): the tokens before it that each may read."""
    length = batch.mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=batch.mask.device).tril()
    before = causal & (batch.mask[:, None] if read is None else read)
    hidden = backbone.language(batch.embeds, batch.positions, before[:, None])
    learnt = batch.labels != IGNORED
    loss: Tensor = nn.functional.cross_entropy(backbone.head(hidden[learnt]), batch.labels[learnt], reduction="sum")
    return loss


def shown_grid(grid: tuple[int, int], pixels: int | None) -> tuple[int, int]:
    """Height and width in visual tokens of an image in a prompt of at most `pixels`."""
    if pixels is None:
        return grid
    height, width = coarse_grid((2 * grid[0], 2 * grid[1]), pixels, CELL // 2, 2)
    return height // 2, width // 2


def cell_labels(layout: Layout, height: int, width: int, textures: bool = True) -> Tensor:
    """(tokens, 5) indices into WORDS of the cell in which the centre of each visual token lies, or NOTHING."""
    at = {thing.cell: thing for thing in layout}
    rows = []
    for cell in cells_of(height, width).tolist():
        kinds = [0, 0, NOTHING]
        if thing := at.get(cell):
            texture = WORDS["texture"].index(thing.texture) if textures else NOTHING
            kinds = [WORDS["colour"].index(thing.colour), WORDS["shape"].index(thing.shape), texture]
        rows.append([*kinds, *divmod(cell, 3)])
    return torch.tensor(rows)


def visual_tokens(sample: Sample) -> int:
    """Visual tokens of all whole images of a sample."""
    return sum(height * width for height, width in grids(sample))


def _chunks(items: Sequence[T], device: torch.device) -> list[Sequence[T]]:
    size = CHUNK[device.type]
    return [items[start : start + size] for start in range(0, len(items), size)]


def embedding_of(backbone: Backbone, word: str) -> Tensor:
    """(d,) the embedding of the word inside a sentence; where it is several tokens, their sum at the same scale."""
    ids = backbone.processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    rows: Tensor = backbone.embedding.weight.detach()[ids]
    summed: Tensor = rows.sum(0) / len(ids) ** 0.5
    return summed
