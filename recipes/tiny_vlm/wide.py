"""The tiny VLM for wide images, before it has seen any of NLVR: it learns to see `boxes`, then to read `sentences`.

A visual token is 20 pixels of a 400 x 100 image, as wide as a block of a tower. Vision: every token becomes the sum of
the embeddings of the words for the shapes whose centres it holds, and of its place. Language: several questions follow
one image, each of which reads the image and itself only, and in some answers a strip of visual tokens appears again.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from recipes.tiny_vlm.boxes import COLOURS, SHAPES, SIDES, SIZES, STEP, Scene, draw_scene, picture
from recipes.tiny_vlm.card import begin
from recipes.tiny_vlm.model import CELL, EMBEDDING_STD, Size, build_model, build_processor
from recipes.tiny_vlm.objectives import answer_loss, embedding_of
from recipes.tiny_vlm.scores import FRESH, answered_right
from recipes.tiny_vlm.sentences import questions
from recipes.tiny_vlm.sequences import ENCODED, Table, prompt_table, stack, word_table
from recipes.tiny_vlm.train import finish
from vismem.config import InvocationConfig, MemoryConfig
from vismem.data.collate import target_text
from vismem.data.sample import Sample
from vismem.generation.invocation import Off
from vismem.generation.prompts import encode, prompt_text
from vismem.models.backbones.base import Backbone
from vismem.models.backbones.qwen2_5_vl import Qwen25VLBackbone
from vismem.models.vismem import VisMemModel
from vismem.training.loop import LoopSettings, Objective, train

ROWS, COLUMNS, SIDE = 5, 20, 20  # visual tokens of an image, and the pixels of it along the side of one
TRUTH = ("false", "true")
BOXES = [0] * 5 + [3] * 2 + [1] * 6 + [3] * 2 + [2] * 5  # the box that each column of tokens shows, or 3
PIXELS = ROWS * COLUMNS * CELL**2  # which every image is resized to
WORDS = (*COLOURS, *SHAPES, *SIZES.values(), *SIDES, "block")
TURN, END = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"  # as in model.CHAT_TEMPLATE
STRIP = (3, 16)  # visual tokens of a strip, the smallest and largest number
STRIP_SHARE = 0.35  # of the answers that have a strip
FIRST_SHARE = 0.7  # of these: it stands first, not behind a delimiter


@dataclass(frozen=True)
class Rates:
    """Peak learning rates."""

    adamw: float
    muon: float


@dataclass(frozen=True)
class WideSettings:
    """How much and how fast it learns."""

    size: Size = field(default_factory=lambda: Size(layers=4, window=COLUMNS))
    scenes: int = 8_000
    questions: int = 20  # of each scene, on average
    vision_steps: int = 2_400
    shapes_only: int = 1_200  # of them, before places are said: of both at once it would learn places first
    language_steps: int = 4_000
    plain: int = 2_400  # of them, before any strip is shown: with strips from the start it learns to read far later
    batch: int = 8  # scenes per step
    asked: int = 10  # questions of each of them
    fresh: int = 100  # scenes that no training has seen, which the base is scored on
    vision_rates: Rates = field(default_factory=lambda: Rates(4e-3, 0.02))
    language_rates: Rates = field(default_factory=lambda: Rates(1e-3, 4e-3))  # at the tower's it does not learn to read


@dataclass
class Sight:
    """See loop.Objective: each visual token becomes the sum of the embeddings of the words for what is there."""

    backbone: Backbone
    scenes: Sequence[Scene]
    images: Sequence[Sample]
    seed: int
    settings: WideSettings

    def __post_init__(self) -> None:
        self.words = {word: embedding_of(self.backbone, word) for word in WORDS}
        draw = torch.Generator().manual_seed(self.seed)
        rows, boxes = torch.randn(2, COLUMNS, self.backbone.width, generator=draw) * EMBEDDING_STD
        self.places = (rows[:ROWS, None] + boxes[BOXES]).flatten(0, 1) / 2

    def collect(self, step: int) -> tuple[list[int], bool]:
        """The scenes of a step, and whether places are said as well."""
        chosen = random.Random(f"{self.seed}/sight/{step}").sample(range(len(self.scenes)), self.settings.batch)
        return chosen, step >= self.settings.shapes_only

    def backward(self, batch: tuple[list[int], bool]) -> dict[str, float]:
        """Add the gradient of the squared error, relative to that of a tower that sees no shapes: 1.0 is that bad."""
        chosen, placed = batch
        prompt = encode(self.backbone, [self.images[at] for at in chosen])
        shapes = torch.cat([self.target(self.scenes[at]) for at in chosen])
        target = shapes + placed * self.places.repeat(len(chosen), 1)
        loss = (prompt.embeds[prompt.visual] - target).square().sum() / shapes.square().sum()
        loss.backward()
        return {"loss": float(loss.detach())}

    def target(self, scene: Scene) -> Tensor:
        """(tokens, d) half the sum of all that is said of the shapes in each."""
        words, cells = self.words, torch.zeros(ROWS * COLUMNS, self.backbone.width)
        for item in (item for box in scene for item in box):
            # With their product, of two shapes in one token it can be told which colour is whose.
            shapes = ("square", "block") if item.shape == "block" else (item.shape,)
            colour, *others = (words[name] for name in (item.colour, *shapes, SIZES[item.size], *item.walls))
            said = [colour, *others, colour * others[0] / EMBEDDING_STD]
            x, y = STEP * item.box + item.left + item.size // 2, item.top + item.size // 2
            cells[COLUMNS * min(y // SIDE, ROWS - 1) + x // SIDE] += torch.stack(said).sum(0)
        return cells / 2


@dataclass
class Reading:
    """See loop.Objective: the mean cross-entropy of the answers to several questions about each of some images."""

    backbone: Backbone
    features: Tensor  # (images * tokens, d)
    questions: Sequence[Sequence[Sample]]  # about each image
    image: Sample  # any of them: all have the same prompt
    seed: int
    settings: WideSettings

    def __post_init__(self) -> None:
        tokenizer = self.backbone.processor.tokenizer
        ids = tokenizer(prompt_text(self.backbone.processor, self.image), add_special_tokens=False)["input_ids"]
        text = [token for token in ids if token != self.backbone.model.config.image_token_id]
        with torch.no_grad():
            table = prompt_table(encode(self.backbone, [self.image]), 0, text, 0)
        self.prefix = table[: table[:, 0].nonzero()[0][-1] + 1 + self.backbone.image_markers]
        self.asked = [
            [
                (tokenizer(one.question + TURN)["input_ids"], tokenizer(target_text(one) + END)["input_ids"])
                for one in asked
            ]
            for asked in self.questions
        ]
        self.line_break, *delimiters = (tokenizer(f"a{text}")["input_ids"][-1] for text in "\n,.:")
        self.delimiters = set(delimiters)

    def collect(self, step: int) -> list[tuple[Table, Tensor]]:
        """The sequences of a step; see `lay_out`."""
        rng = random.Random(f"{self.seed}/reading/{step}")
        strips = STRIP_SHARE if step >= self.settings.plain else 0
        chosen = rng.sample(range(len(self.asked)), self.settings.batch)
        return [self.lay_out(at, rng, strips) for at in chosen]

    def backward(self, batch: list[tuple[Table, Tensor]]) -> dict[str, float]:
        """Add the gradient of the mean over the answers' tokens."""
        rows = stack(self.backbone, self.features, [table for table, _ in batch])
        part = pad_sequence([numbers for _, numbers in batch], batch_first=True, padding_value=-1)
        read = (part[:, None] == part[:, :, None]) | (part[:, None] == 0)
        loss = answer_loss(self.backbone, rows, read) / sum(int(table[:, 2].sum()) for table, _ in batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach())}

    def lay_out(self, at: int, rng: random.Random, strips: float) -> tuple[Table, Tensor]:
        """One image with some of its questions, and for each token the number of its question, or 0: the image's.

        `strips`: the share of the answers that have one.
        """
        image, first, asked = self.prefix.copy(), at * ROWS * COLUMNS, self.asked[at]
        image[image[:, 0] > 0, 0] += first
        following, parts, numbers = 1 + int(image[:, 3:].max()), [image], [0] * len(image)
        for number, (prompt, answer) in enumerate(rng.sample(asked, min(len(asked), self.settings.asked)), start=1):
            pieces, place = [word_table(prompt)], 0
            if rng.random() < strips:
                shown = sorted(rng.sample(range(ROWS * COLUMNS), rng.randint(*STRIP)))
                if rng.random() >= FIRST_SHARE:
                    place = 1 + rng.choice([at for at, token in enumerate(answer) if token in self.delimiters])
                strip = word_table([self.line_break] * (len(shown) + 2))
                strip[1:-1, 0] = [1 + first + token for token in shown]
                pieces += [word_table(answer[:place], learnt=True), strip]
            question = np.concatenate([*pieces, word_table(answer[place:], learnt=True)])
            question[:, 3:] = following + np.arange(len(question))[:, None]
            parts.append(question)
            numbers += [number] * len(question)
        return np.concatenate(parts), torch.tensor(numbers)


def train_wide(out: Path, seed: int, settings: WideSettings, origin: dict[str, Any]) -> Path:
    """Write the trained model with its card to `out`, in Hugging Face format; return `out`. A killed run resumes."""
    work = out.with_name(f"{out.name}.partial")
    started = begin(work, {"seed": seed, "settings": asdict(settings)}, origin)
    rng = random.Random(f"{seed}/boxes")
    scenes = [draw_scene(rng) for _ in range(settings.scenes)]
    images = [Sample(id="", images=(picture(scene),), question="", answer="") for scene in scenes]
    asked = questions(scenes, settings.questions, rng)
    texts = (f"{one.question} a {target_text(one)}" for each in asked for one in each)
    processor = build_processor(texts, PIXELS - CELL**2 // 2, PIXELS)
    backbone = Qwen25VLBackbone(build_model(settings.size, processor, seed), processor)
    model, last = backbone.model, {}

    def learn(name: str, objective: Objective, module: nn.Module, steps: int, rates: Rates) -> None:
        model.requires_grad_(False)
        module.requires_grad_(True)
        loop = LoopSettings(name, steps, rates.adamw, 0.05, rates.muon, weight_decay=0.01)
        last[name] = train(objective, dict(module.named_parameters()), loop, work, Accelerator(cpu=True)).last

    sight = Sight(backbone, scenes, images, seed, settings)
    learn("vision", sight, backbone.visual, settings.vision_steps, settings.vision_rates)
    with torch.no_grad():
        seen = (encode(backbone, images[at : at + ENCODED]) for at in range(0, len(images), ENCODED))
        features = torch.cat([prompt.embeds[prompt.visual].half() for prompt in seen])
    reading = Reading(backbone, features, asked, images[0], seed, settings)
    speaking = nn.ModuleDict({"language": model.model.language_model, "head": model.lm_head})
    learn("language", reading, speaking, settings.language_steps, settings.language_rates)
    model.requires_grad_(False).eval().save_pretrained(work)
    processor.save_pretrained(work)
    facts = {"parameters": model.num_parameters(), "last": last, "fresh": fresh_score(backbone, settings)}
    return finish(work, out, "wide.md.j2", {**started, **facts})


def fresh_score(backbone: Backbone, settings: WideSettings) -> dict[str, float]:
    """Of sentences about scenes that no training has seen: how many, and the percent of greedy answers that are right.

    Without looking it is 50: each is asked of a scene of which it is true, and of one of which it is false.
    """
    rng = random.Random(f"{FRESH}/boxes")
    scenes = [draw_scene(rng) for _ in range(settings.fresh)]
    samples = [
        replace(one, images=(picture(scene),), choices=TRUTH)
        for scene, asked in zip(scenes, questions(scenes, settings.asked, rng), strict=True)
        for one in asked
        if one.answer in TRUTH
    ]
    right = answered_right(VisMemModel(backbone, MemoryConfig(prompt_pixels=0), InvocationConfig()), samples, Off())
    return {"n": len(right), "score": round(100 * sum(right) / max(len(right), 1), 2)}
