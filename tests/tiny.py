"""Tiny real models with random weights, and scenes to ask them about."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from recipes.tiny_vlm.card import CARD, FACTS, render
from recipes.tiny_vlm.model import Size, build_model, build_processor
from vismem.config import InvocationConfig, MemoryConfig, ScenesSource
from vismem.data.collate import target_text
from vismem.data.sample import Sample, write_shards
from vismem.data.scenes import generate
from vismem.files import read_json
from vismem.models.loading import load_base
from vismem.models.tokens import MEMORY_TOKENS
from vismem.models.vismem import VisMemModel
from vismem.provenance import file_hashes, verify_manifest

SIZE = Size(width=32, layers=2, heads=2, vision_width=32, vision_layers=2)
MEMORY = MemoryConfig(
    queries=4, short_length=4, long_length=6, builder_layers=1, builder_heads=2, lora_rank=4, prompt_pixels=0
)


@lru_cache
def samples(count: int = 12) -> tuple[Sample, ...]:
    """A few scene questions, multi-image ones among them."""
    source = ScenesSource(train=count, validation=0, test=0, image_size=84, tasks=())
    return tuple(generate(source, "train", seed=0))


def save_base(folder: Path, seed: int = 0) -> Path:
    """Write a tiny random Qwen2.5-VL in Hugging Face format.

    As real Qwen's, its head has more rows than the tokenizer has tokens: here four, whose ids the memory tokens get.
    """
    processor = build_processor([s.question for s in samples()] + [target_text(s) for s in samples()])
    model = build_model(SIZE, processor, seed)
    model.resize_token_embeddings(len(processor.tokenizer) + len(MEMORY_TOKENS), mean_resizing=False)
    with torch.no_grad():  # a head that starts from the embeddings would only repeat the last word
        head = model.lm_head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        head[-len(MEMORY_TOKENS) :] = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def vismem(
    base: Path,
    memory: MemoryConfig = MEMORY,
    limit: int = 3,
    seed: int = 0,
    kind: type[VisMemModel] = VisMemModel,
) -> VisMemModel:
    """VisMem, or a variant of it. What starts at zero is moved off it, so that an adapter left on would show."""
    model = kind(load_base(base), memory, InvocationConfig(max_per_answer=limit, anywhere=True), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (".up." in name and not name.startswith("policy_lora")) or name in (
                "long.output.weight",
                "short.wanted.weight",
            ):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def eager(base: Path) -> VisMemModel:
    """A model that likes to invoke: the heads of its invoke tokens are random."""
    model = vismem(base, seed=1)
    with torch.no_grad():
        model.tokens.head.copy_(torch.randn(model.tokens.head.shape, generator=torch.Generator().manual_seed(0)))
    return model.requires_grad_(False)


def save_data(folder: Path, count: int = 12) -> Path:
    """Write a validated data set of scenes as the step `validate` leaves it: `folder/data/SPLIT`."""
    source = ScenesSource(train=count, validation=count, test=count)
    for split in ("train", "validation", "test"):
        write_shards(generate(source, split, seed=0), folder / "data" / split)
    return folder


def check_card(folder: Path) -> None:
    """The files are those of the manifest, and the card says what the facts say, each file's hash included."""
    assert verify_manifest(folder) == []
    hashes = file_hashes(folder)
    hashes.pop(CARD)
    card = (folder / CARD).read_text()
    assert card == render(read_json(folder / FACTS), hashes)
    assert all(f"| {name} | {value} |" in card for name, value in hashes.items())


@contextmanager
def formed(model: VisMemModel) -> Iterator[list[torch.Tensor]]:
    """Within the block, every memory that the model forms is kept, (rows, N, d) each."""
    kept, form = list[torch.Tensor](), model.form

    def keep(*inputs: Any) -> torch.Tensor:
        kept.append(form(*inputs))
        return kept[-1]

    with patch.object(model, "form", keep):
        yield kept
