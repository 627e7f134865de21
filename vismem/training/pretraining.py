"""The two phases in which the embedded base learns: first to see, then to speak of what it sees.

Phase "vision": the vision tower and the projector learn to turn each cell of generated scenes into the sum of the
(untrained) embeddings of the words for its colour, shape, row and column; then they are frozen. Phase "language": on
the cached image features the language model learns the pretrain split; in a share of the batches the images appear
again inside the answer.
"""

import io
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from vismem.config import BaseConfig
from vismem.data.sample import Sample
from vismem.data.tasks.layouts import COLOURS, COLUMNS, ROWS, SHAPES
from vismem.errors import UserError
from vismem.models.backbones.base import Backbone
from vismem.models.backbones.qwen2_5_vl import Qwen25VLBackbone
from vismem.training.embedded import EMBEDDING_STD
from vismem.training.optimizers import optimizers
from vismem.training.sequences import IGNORED, Batch, Encoder, Picture, Record, collate

CHECKPOINT_EVERY = 100
VISION_BATCH = 64  # images a step
CHUNK = 16  # questions of similar length in one forward pass; changes the speed, not the gradient
WORDS: dict[str, tuple[str, ...]] = {  # what is said of a cell, kind by kind
    "colour": ("empty", *COLOURS),
    "shape": ("empty", *SHAPES),
    "row": ROWS,
    "column": COLUMNS,
}


@dataclass(frozen=True)
class Phase:
    """How one phase is run. `folder` keeps its checkpoint, from which a killed run goes on as if never killed."""

    name: str
    steps: int
    learning_rate: float
    folder: Path
    matrix_rate: float = 0.0  # Muon's rate on the layers' matrices; 0: AdamW on everything

    def factor(self, step: int) -> float:
        """The rates' factor: 5 % warm-up, then cosine to a twentieth."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return (step + 1) / warm
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def run_phase(phase: Phase, module: nn.Module, backward_at: Callable[[int], float]) -> list[dict[str, Any]]:
    """Train the module's parameters and return the loss curve.

    `backward_at(step)` adds the gradients of one step and returns its loss; both must depend on the step and the
    weights only.
    """
    used = optimizers(
        dict(module.named_parameters()), phase.learning_rate, phase.matrix_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    file = phase.folder / f"{phase.name}.checkpoint"
    curve: list[dict[str, Any]] = []
    start = 0
    if file.is_file():
        saved = torch.load(file, weights_only=True)
        module.load_state_dict(saved["module"])
        for optimizer, state in zip(used, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start, curve = saved["step"], saved["curve"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"base: {phase.name}", total=phase.steps, completed=start)
        for step in range(start, phase.steps):
            module.zero_grad()
            loss = backward_at(step)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in used:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * phase.factor(step)
                optimizer.step()
            if step % 10 == 0 or step == phase.steps - 1:
                curve.append({"phase": phase.name, "step": step, "loss": round(loss, 5)})
            progress.update(bar, advance=1, description=f"base: {phase.name}, loss {curve[-1]['loss']:.3f}")
            if (step + 1) % CHECKPOINT_EVERY == 0 or step == phase.steps - 1:
                state = {
                    "module": module.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in used],
                    "step": step + 1,
                    "curve": curve,
                }
                torch.save(state, file.with_suffix(".new"))
                os.replace(file.with_suffix(".new"), file)
    module.zero_grad()
    return curve


# --- vision ----------------------------------------------------------------------------------------------------------


def train_vision(
    backbone: Qwen25VLBackbone, encoder: Encoder, samples: Sequence[Sample], config: BaseConfig, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """Train the vision tower and the projector to name the cells of the samples' scenes; return the loss curve.

    A visual token is to be the sum of the embeddings of its cell's words, brought to their scale. (Trained as
    classifiers the features collapse into a dozen directions, in which places hardly show, and the language model
    takes far longer to learn to look things up.)

    UserError where no sample knows its scene, since a tower this small does not learn to see from answers alone.
    """
    scenes = [scene for sample in samples for scene in sample.scene_truth() or [None] * len(sample.images)]
    known = [
        index
        for index, scene in enumerate(scenes)
        if scene is not None and encoder.pictures[index].height == encoder.pictures[index].width
    ]
    known = [index for index in known if encoder.pictures[index].height == encoder.pictures[known[0]].height]
    if not known:
        raise UserError(
            "base.model 'embedded' learns to see from generated scenes, and the pretrain split has none: "
            "give prepare.sources a 'scenes' source with pretrain > 0, or name a model in base.model"
        )
    words = cell_words(backbone)

    def backward_at(step: int) -> float:
        rng = random.Random(f"{seed}/vision/{step}")
        chosen = [rng.choice(known) for _ in range(VISION_BATCH)]
        features = _features(backbone, encoder, chosen)
        labels = torch.stack([cell_labels(scenes[index], encoder.pictures[index]) for index in chosen])
        loss = nn.functional.mse_loss(features, cell_targets(words, labels)) / EMBEDDING_STD**2
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    phase = Phase("vision", config.vision_steps, config.learning_rate, folder, config.matrix_learning_rate)
    return run_phase(phase, backbone.visual, backward_at)


def cell_words(backbone: Backbone) -> list[Tensor]:
    """For each kind of WORDS the embeddings (values, d) of its words."""
    return [torch.stack([_embedding_of(backbone, word) for word in kind]) for kind in WORDS.values()]


def cell_targets(words: Sequence[Tensor], labels: Tensor) -> Tensor:
    """(..., d) what a visual token is to be, of its cell's labels (..., kinds)."""
    summed: Tensor = torch.stack([kind[labels[..., index]] for index, kind in enumerate(words)]).sum(0)
    return summed / math.sqrt(len(words))


def _embedding_of(backbone: Backbone, word: str) -> Tensor:
    """(d,) the embedding of the word inside a sentence; where it is several tokens, their sum at the same scale."""
    ids = backbone.processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    rows: Tensor = backbone.embedding.weight.detach()[ids]
    summed: Tensor = rows.sum(0) / len(ids) ** 0.5
    return summed


def cell_labels(scene: dict[str, Any], picture: Picture) -> Tensor:
    """(tokens, 4) indices into WORDS of the cell in which each visual token lies."""
    at = {(thing["row"], thing["column"]): thing for thing in scene["objects"]}
    rows = []
    for index in range(picture.height * picture.width):
        row, column = index // picture.width * 3 // picture.height, index % picture.width * 3 // picture.width
        here = {"row": ROWS[row], "column": COLUMNS[column]}
        thing = {"colour": "empty", "shape": "empty", **at.get((row, column), {}), **here}
        rows.append([values.index(thing[name]) for name, values in WORDS.items()])
    return torch.tensor(rows)


@torch.no_grad()
def image_features(backbone: Qwen25VLBackbone, encoder: Encoder) -> Tensor:
    """The feature table (rows, d) of all of the encoder's images, equal sizes batched."""
    table = torch.zeros(encoder.rows, backbone.width)
    sizes = sorted({(picture.height, picture.width) for picture in encoder.pictures})
    for size in sizes:
        alike = [index for index, picture in enumerate(encoder.pictures) if (picture.height, picture.width) == size]
        for at in range(0, len(alike), 256):
            chosen = alike[at : at + 256]
            for index, features in zip(chosen, _features(backbone, encoder, chosen), strict=True):
                start = encoder.pictures[index].start
                table[start : start + len(features)] = features
    return table


def _features(backbone: Qwen25VLBackbone, encoder: Encoder, chosen: Sequence[int]) -> Tensor:
    """(images, tokens, d) features of images of one size."""
    images = [Image.open(io.BytesIO(encoder.images[index])).convert("RGB") for index in chosen]
    vision = backbone._vision_input([[pixels] for pixels in backbone._pixels(images)])
    return backbone.project(backbone.patch_stream(vision).hidden)


# --- language --------------------------------------------------------------------------------------------------------


def train_language(
    backbone: Qwen25VLBackbone,
    encoder: Encoder,
    records: Sequence[Record],
    config: BaseConfig,
    seed: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """Train embeddings, language model and head on the records; the vision tower stays as it is. Returns the curve."""
    table = image_features(backbone, encoder)
    model, settings = backbone.model, backbone.model.config
    block = (settings.vision_start_token_id, settings.image_token_id, settings.vision_end_token_id)
    line = backbone.processor.tokenizer("\n")["input_ids"][0]
    module = nn.ModuleDict({"language": model.model.language_model, "head": model.lm_head})

    def backward_at(step: int) -> float:
        rng = random.Random(f"{seed}/language/{step}")
        chosen = [rng.choice(records) for _ in range(config.batch_size)]
        chosen.sort(key=lambda record: record.length)
        learnt = sum(len(record.target) for record in chosen)
        again = rng if rng.random() < config.interleave else None
        total = 0.0
        for at in range(0, len(chosen), CHUNK):
            batch = collate(chosen[at : at + CHUNK], block, settings.text_config.pad_token_id, again, line)
            loss = answer_loss(backbone, batch, table) / learnt
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    phase = Phase("language", config.steps, config.learning_rate, folder, config.matrix_learning_rate)
    return run_phase(phase, module, backward_at)


def answer_loss(backbone: Qwen25VLBackbone, batch: Batch, table: Tensor) -> Tensor:
    """Summed cross-entropy of the answers' tokens."""
    words = backbone.embedding(batch.ids)
    embeds = torch.where((batch.features >= 0)[..., None], table[batch.features.clamp(min=0)], words)
    hidden = backbone.model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    learnt = batch.labels != IGNORED
    loss: Tensor = nn.functional.cross_entropy(backbone.head(hidden[learnt]), batch.labels[learnt], reduction="sum")
    return loss
