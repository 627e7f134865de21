"""What the tiny VLM answers without memory, by Hugging Face's own `generate`."""

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from recipes.tiny_vlm.scenes import of_size
from vismem.config import ScenesSource
from vismem.data.collate import answer_part
from vismem.data.sample import Sample
from vismem.data.scenes import generate
from vismem.generation.prompts import prompt_text

FRESH = 1_000_000  # a seed whose questions no training has seen
SIZES = ((84, 84), (56, 56), (112, 112), (168, 168), (168, 84), (84, 168), (140, 112))  # width, height
BATCH = 52
MAX_NEW_TOKENS = 56


def score(model: Any, processor: Any, count: int, sizes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Percent of right answers by picture size, on `count` fresh questions of the pretrain split each."""
    return {
        f"{width} x {height}": accuracy(model, processor, of_size(count, FRESH, width, height))
        for width, height in sizes
    }


def score_validation(model: Any, processor: Any, count: int) -> float:
    """Percent of right answers on the validation split, whose scenes hold more objects and other wordings."""
    return accuracy(model, processor, list(generate(ScenesSource(), "validation", 0, count)))


@torch.no_grad()
def accuracy(model: Any, processor: Any, samples: Sequence[Sample]) -> float:
    """Percent of greedy answers that equal the reference answer."""
    texts: list[str] = []
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        prompts = [prompt_text(processor, sample) for sample in batch]
        images = [[Image.open(io.BytesIO(image)).convert("RGB") for image in sample.images] for sample in batch]
        encoded = processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
        made = model.generate(**encoded, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts += processor.batch_decode(made[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(answer_part(text) == sample.answer for sample, text in zip(samples, texts, strict=True))
    return round(100 * right / max(1, len(samples)), 2)
