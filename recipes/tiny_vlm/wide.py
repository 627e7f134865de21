"""The tiny VLM for wide images, before it has seen any of NLVR: it learns from `boxes`, first to see, then to read.

A visual token is 20 pixels of a 400 x 100 image, as wide as a block of a tower. Vision: every token becomes the sum of
the embeddings of the words for the shapes whose centres it holds. Language: ten questions follow one image, each of
which sees the image and itself only, and in some answers a strip of visual tokens appears again.
"""

import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from recipes.tiny_vlm.boxes import COLOURS, SHAPES, SIDES, SIZES, Scene, draw_scene, picture, question
from recipes.tiny_vlm.card import STARTED, begin, write_card
from recipes.tiny_vlm.model import CELL, EMBEDDING_STD, Size, build_model, build_processor
from recipes.tiny_vlm.objectives import embedding_of
from recipes.tiny_vlm.sequences import ENCODED, IGNORED, Sequences
from vismem.data.collate import ANSWER_MARK
from vismem.data.sample import Sample
from vismem.generation.prompts import encode, prompt_text
from vismem.models.backbones.base import Backbone
from vismem.models.backbones.qwen2_5_vl import Qwen25VLBackbone
from vismem.training.loop import LoopSettings, Objective, train

ROWS, COLUMNS, TOKEN = 5, 20, 20  # visual tokens of an image, and the pixels along the side of one
PIXELS = ROWS * COLUMNS * CELL**2  # which every image is resized to
TURN = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


@dataclass(frozen=True)
class WideSettings:
    """How much and how fast it learns."""

    size: Size = Size(layers=4)
    scenes: int = 3_000
    questions: int = 30  # of each scene
    vision_steps: int = 220
    vision_batch: int = 16  # scenes
    language_steps: int = 650
    batch: int = 16  # scenes
    asked: int = 10  # questions of each of them in a step
    strips: float = 0.35  # share of the answers with a strip
    learning_rate: float = 4e-3
    matrix_learning_rate: float = 0.01


class Sight:
    """See loop.Objective: the mean squared error between a visual token and its words, 1.0 without any features."""

    def __init__(self, backbone: Backbone, scenes: Sequence[Scene], images: Sequence[Sample], seed: int, batch: int):
        self.backbone, self.scenes, self.images, self.seed, self.batch = backbone, scenes, images, seed, batch
        words = (*COLOURS, *SHAPES, *SIZES.values(), *SIDES, "block", "base", *"12345", "first", "second", "third", "wall")
        self.words = {word: embedding_of(backbone, word) for word in words}

    def collect(self, step: int) -> list[int]:
        """The scenes of a step."""
        return random.Random(f"{self.seed}/sight/{step}").sample(range(len(self.scenes)), self.batch)

    def backward(self, batch: list[int]) -> dict[str, float]:
        """Add the gradient."""
        prompt = encode(self.backbone, [self.images[at] for at in batch])
        target = torch.cat([self.target(self.scenes[at]) for at in batch])
        loss = (prompt.embeds[prompt.visual] - target).square().mean() / EMBEDDING_STD**2
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach())}

    def target(self, scene: Scene) -> Tensor:
        """(tokens, d) the words of each token: its row and box, and of each shape all that is said of it."""
        cells: list[Tensor] = []
        for row in range(ROWS):
            for column in range(COLUMNS):
                x = TOKEN * column + TOKEN // 2
                box = ("first", "second", "third")[x // 150] if x % 150 < 100 else "wall"
                cells.append(self.words[str(row + 1)] + self.words[box])
        for item in scene.items:
            colour, shape = self.words[item.colour], self.words[item.shape]
            said = [colour, shape, self.words[SIZES[item.size]], colour * shape / EMBEDDING_STD]  # which go together
            said += [self.words[wall] for wall in item.walls]
            if scene.towers:
                said += [self.words["block"]]
            x, y = 150 * item.box + item.left + item.size // 2, item.top + item.size // 2
            at = COLUMNS * min(y // TOKEN, ROWS - 1) + x // TOKEN
            cells[at] = cells[at] + torch.stack(said).sum(0)
        return torch.stack(cells) / 2


class Reading:
    """See loop.Objective: the cross-entropy of the answers of several questions about each of some images."""

    def __init__(
        self, backbone: Backbone, features: Tensor, asked: Sequence[Sequence[tuple[list[int], list[int]]]],
        settings: WideSettings, seed: int,
    ) -> None:  # fmt: skip
        self.backbone, self.features, self.asked, self.settings, self.seed = backbone, features, asked, settings, seed
        tokenizer = backbone.processor.tokenizer
        sample = Sample(id="", images=(picture(draw_scene(random.Random(0))),), question="", answer="")
        with torch.no_grad():
            prompt = encode(backbone, [sample])
        text = prompt_text(backbone.processor, sample).split("<|image_pad|>")[0]
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        self.prefix = torch.tensor([*before, tokenizer.convert_tokens_to_ids("<|vision_end|>")])
        self.image = len(before)  # where the image's tokens stand
        self.positions = prompt.positions[:, 0, : len(self.prefix) + features.shape[1]]
        self.line_break, self.colon = (tokenizer(text)["input_ids"][-1] for text in ("\n", ANSWER_MARK))

    def collect(self, step: int) -> tuple[Sequences, Tensor]:
        """The sequences of a step, and which tokens each of their tokens may read."""
        rng = random.Random(f"{self.seed}/reading/{step}")
        rows = [self.laid_out(at, rng) for at in rng.sample(range(len(self.asked)), self.settings.batch)]
        embeds, positions, block, labels = (pad_sequence([row[k] for row in rows], True, (0, 0, -1, IGNORED)[k]) for k in range(4))
        causal = torch.ones(block.shape[1], block.shape[1], dtype=torch.bool).tril()
        reads = causal & ((block[:, None] == block[:, :, None]) | (block[:, None] == 0))
        return Sequences(embeds, positions.permute(2, 0, 1), block >= 0, labels), reads[:, None]

    def laid_out(self, at: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One image with some of its questions: embeddings, positions, number of the question (0: the image), labels."""
        seen = self.features[at].float()
        words = self.backbone.embedding(self.prefix)
        prefix = torch.cat([words[: self.image], seen, words[self.image :]])
        embeds, positions = [prefix], [self.positions.T]
        block, labels = [torch.zeros(len(prefix), dtype=torch.long)], [torch.full((len(prefix),), IGNORED)]
        for number, (prompt, answer) in enumerate(rng.sample(self.asked[at], self.settings.asked), start=1):
            ids = torch.tensor([*prompt, *answer])
            words, label = self.backbone.embedding(ids), ids.clone()
            label[: len(prompt)] = IGNORED
            label = torch.cat([label[1:], torch.tensor([IGNORED])])
            if rng.random() < self.settings.strips:
                shown = sorted(rng.sample(range(len(seen)), rng.randint(3, 16)))
                ends = self.backbone.embedding(torch.tensor([self.line_break]))
                strip = torch.cat([ends, seen[shown], ends])
                place = len(prompt) + (0 if rng.random() < 0.7 else 1 + answer.index(self.colon))
                words = torch.cat([words[:place], strip, words[place:]])
                gap = torch.full((len(strip),), IGNORED)
                gap[-1] = ids[place]
                label = torch.cat([label[: place - 1], torch.tensor([IGNORED]), gap, label[place:]])
            embeds.append(words)
            following = int(self.positions.max()) + 1 + torch.arange(len(words))
            positions.append(following[:, None].expand(-1, 3))
            block.append(torch.full((len(words),), number))
            labels.append(label)
        return torch.cat(embeds), torch.cat(positions), torch.cat(block), torch.cat(labels)

    def backward(self, batch: tuple[Sequences, Tensor]) -> dict[str, float]:
        """Add the gradient of the mean over the answers' tokens."""
        rows, reads = batch
        hidden = self.backbone.language(rows.embeds, rows.positions, reads)
        learnt = rows.labels != IGNORED
        logits, labels = self.backbone.head(hidden[learnt]), rows.labels[learnt]
        loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        said = (labels != self.backbone.processor.tokenizer.eos_token_id)
        return {"loss": float(loss.detach()), "accuracy": float((logits.argmax(-1) == labels)[said].float().mean())}


def train_wide(out: Path, seed: int, settings: WideSettings, origin: dict[str, Any]) -> Path:
    """Write the trained model with its card to `out`, in Hugging Face format; return `out`. A killed run resumes."""
    work = out.with_name(f"{out.name}.partial")
    started = begin(work, {"seed": seed, "settings": asdict(settings)}, origin)
    drawn = [_scene(seed, at, settings.questions) for at in range(settings.scenes)]
    samples = [Sample(id="", images=(image,), question="", answer="") for _, image, _ in drawn]
    processor = build_processor((f"{text} a {ANSWER_MARK} {answer}" for *_, pairs in drawn for text, answer in pairs), PIXELS - CELL**2 // 2, PIXELS)
    backbone = Qwen25VLBackbone(build_model(settings.size, processor, seed), processor)
    model, losses = backbone.model, {}

    def learn(name: str, objective: Objective, module: nn.Module, steps: int) -> None:
        model.requires_grad_(False)
        module.requires_grad_(True)
        loop = LoopSettings(name, steps, settings.learning_rate, 0.05, settings.matrix_learning_rate, weight_decay=0.01)
        losses[name] = train(objective, dict(module.named_parameters()), loop, work, Accelerator(cpu=True)).last

    sight = Sight(backbone, [scene for scene, *_ in drawn], samples, seed, settings.vision_batch)
    learn("vision", sight, backbone.visual, settings.vision_steps)
    with torch.no_grad():
        batches = (encode(backbone, samples[at : at + ENCODED]) for at in range(0, len(samples), ENCODED))
        features = torch.cat([seen.embeds[seen.visual].view(-1, ROWS * COLUMNS, backbone.width).half() for seen in batches])
    tokenizer = processor.tokenizer
    asked = [
        [(tokenizer(text + TURN)["input_ids"], tokenizer(f"{ANSWER_MARK} {answer}{END}")["input_ids"]) for text, answer in pairs]
        for *_, pairs in drawn
    ]
    speaking = nn.ModuleDict({"language": model.model.language_model, "head": model.lm_head})
    learn("language", Reading(backbone, features, asked, settings, seed), speaking, settings.language_steps)
    model.requires_grad_(False).eval().save_pretrained(work)
    processor.save_pretrained(work)
    for leftover in (*work.glob("*.checkpoint"), work / STARTED):
        leftover.unlink()
    write_card(work, "wide.md.j2", {**started, "parameters": model.num_parameters(), "last": losses})
    shutil.rmtree(out, ignore_errors=True)
    work.rename(out)
    return out


def _scene(seed: int, at: int, questions: int) -> tuple[Scene, bytes, list[tuple[str, str]]]:
    rng = random.Random(f"{seed}/boxes/{at}")
    scene = draw_scene(rng)
    return scene, picture(scene), [question(scene, rng) for _ in range(questions)]
