"""What VisMem asks of a vision-language model family: the one interface behind which families differ."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vismem.models.backbones.decoder import TokenDecoder
from vismem.models.lora import LoraTarget


@dataclass(frozen=True)
class Clip:
    """A decoded video: PIL images of one size."""

    frames: list[Any]
    fps: float  # frames per second of the video


@dataclass
class VisionInput:
    """The patches of S samples, right-padded to P tokens, in merge order (g consecutive patches make one token)."""

    patches: Tensor  # (S, P, patch values), flattened pixels
    positions: Tensor  # (S, P, 2) height and width of each patch in its image (or tile)
    image: Tensor  # (S, P) which attention segment (image, time of a video, tile) of the sample; -1 on padding
    window: Tensor  # (S, P) which attention window of the sample; -1 on padding

    @property
    def mask(self) -> Tensor:
        """(S, P) True on patches, False on padding."""
        return self.image >= 0


@dataclass
class PatchStream:
    """The patches inside the vision encoder: their embeddings, and keys and values of every block."""

    embeds: Tensor  # (S, P, w) patch embeddings, before the first block
    keys_values: list[tuple[Tensor, Tensor]]  # per block: (S, heads, P, head width) each; class tokens may come on top
    hidden: Tensor  # (S, P, w) as the projector takes it
    vision: VisionInput


@dataclass
class Prompt:
    """S prompts ready for the language model, right-padded to L."""

    embeds: Tensor  # (S, L, d), image features in their places
    positions: Tensor  # (3, S, L)
    mask: Tensor  # (S, L) bool
    visual: Tensor  # (S, L) bool, True at image and video tokens
    vision: VisionInput

    def next_position(self) -> Tensor:
        """(S,) the position of the first answer token: the largest of the prompt, plus one."""
        largest: Tensor = self.positions.masked_fill(~self.mask, -1).amax(dim=(0, 2))
        return largest + 1


class Backbone(ABC):
    """A VLM of one family, frozen. `model` is the Hugging Face model, `processor` its processor."""

    family: str
    takes_video = False
    image_markers = 1  # tokens that open an image in a prompt, and as many that close it
    model: Any
    processor: Any

    @property
    def width(self) -> int:
        """d, width of the language model."""
        return int(self.model.config.text_config.hidden_size)

    @property
    def vision_width(self) -> int:
        """w, width of the vision encoder."""
        return int(self.model.config.vision_config.hidden_size)

    @property
    @abstractmethod
    def merge(self) -> int:
        """g, patch tokens that the projector merges into one."""

    @abstractmethod
    def prompt(self, texts: list[str], images: list[list[Any]], videos: list[list[Clip]]) -> Prompt:
        """Encode chat-formatted texts with their PIL images and videos; runs the vision encoder once.

        In a text, images stand before videos. A family that takes no video is given none.
        """

    @abstractmethod
    def patch_stream(self, vision: VisionInput) -> PatchStream:
        """Run the patches through the vision encoder (with whatever adapter is active)."""

    @abstractmethod
    def memory_stream(self, tokens: Tensor, positions: Tensor | None, stream: PatchStream, sample: Tensor) -> Tensor:
        """Run extra tokens (R, T, w) beside the patches of samples `sample` (R,): they read patches, never reversely.

        `positions` (R, T, 2) are their rotary positions, negative for the identity; encoders without ignore them.
        Returns (R, T, w), as the projector takes it.
        """

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:
        """The family's own projector: (R, g * N, w) to (R, N, d)."""

    @abstractmethod
    def language(self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """Last hidden states (R, L, d) of embeddings (R, L, d); positions (3, R, L); mask (R, 1, L, keys) bool."""

    def _language(self, embeds: Tensor, positions: Tensor, mask: Any, cache: Any) -> Tensor:
        """`language`, with positions and mask as Hugging Face's language model takes them."""
        output = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def step(self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """`language` for one token per row, faster where the decoder is a known one."""
        return self._step(embeds, positions, mask, cache)

    @cached_property
    def _step(self) -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
        language = self.model.model.language_model
        return TokenDecoder(language) if TokenDecoder.known(language) else self.language

    @abstractmethod
    def vision_targets(self) -> list[LoraTarget]:
        """The q and v projections of the vision encoder."""

    def language_targets(self, every_linear: bool = False) -> list[LoraTarget]:
        """The q_proj and v_proj of the language model, or all linear layers of its blocks."""
        return [
            LoraTarget(f"layers.{i}.{name}", linear, 0, linear.out_features)
            for i, layer in enumerate(self.model.model.language_model.layers)
            for name, linear in layer.named_modules()
            if isinstance(linear, nn.Linear) and (every_linear or name.endswith((".q_proj", ".v_proj")))
        ]

    def without_patches(self, vision: VisionInput, heads: int, blocks: int, states: int = 1) -> PatchStream:
        """The stream of samples none of which has an image."""
        samples, weight = len(vision.image), self.embedding.weight
        embeds = weight.new_zeros(samples, 0, self.vision_width)
        none = weight.new_zeros(samples, heads, 0, self.vision_width // heads)
        return PatchStream(embeds, [(none, none)] * blocks, embeds.repeat(1, 1, states), vision)

    @cached_property  # Hugging Face searches for them at every call
    def embedding(self) -> nn.Embedding:
        """The input embedding matrix."""
        layer: nn.Embedding = self.model.get_input_embeddings()
        return layer

    @cached_property
    def head(self) -> nn.Linear:
        """The output head."""
        layer: nn.Linear = self.model.get_output_embeddings()
        return layer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device
