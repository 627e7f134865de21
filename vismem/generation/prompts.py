"""From samples to prompts, and what the language model knows after reading them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vismem.data.collate import prompt_messages
from vismem.data.sample import Sample
from vismem.models.backbones.base import Backbone, Prompt


@dataclass
class VisualStates:
    """The last hidden states at the image tokens of S prompts, packed to the left: v_1..v_y of H."""

    hidden: Tensor  # (S, V, d)
    mask: Tensor  # (S, V)


def encode(backbone: Backbone, samples: Sequence[Sample]) -> Prompt:
    """The chat-formatted prompts of the samples, with their images."""
    template = backbone.processor.apply_chat_template
    texts = [template(prompt_messages(s), tokenize=False, add_generation_prompt=True) for s in samples]
    images = [[Image.open(io.BytesIO(data)).convert("RGB") for data in sample.images] for sample in samples]
    return backbone.prompt(texts, images)


def visual_states(prompt: Prompt, hidden: Tensor) -> VisualStates:
    """Pick the image tokens' hidden states out of the prompts' (S, L, d)."""
    order = prompt.visual.int().argsort(dim=1, descending=True, stable=True)
    longest = int(prompt.visual.sum(1).max())
    mask = prompt.visual.gather(1, order)[:, :longest]
    return VisualStates(hidden.gather(1, order[:, :longest, None].expand(-1, -1, hidden.shape[-1])), mask)


def last_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """(S, d) the hidden state of each row's last real token in right-padded (S, L, d)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
