"""What VisMem asks of a vision-language model family: the one interface behind which families differ."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vismem.errors import UserError
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
    """The patches inside the vision encoder: their embeddings, the keys and values that memory tokens read, and what
    the projector makes of them.
    """

    embeds: Tensor  # (S, P, w) patch embeddings, before the first block
    # per block in which memory tokens read patches: (S, heads, keys, head width) each; class tokens may be added
    keys_values: list[tuple[Tensor, Tensor]]
    features: Tensor  # (S, P / g, d) image tokens
    vision: VisionInput
    readable: Tensor  # (S, keys) False on padding

    def memory_mask(self, sample: Tensor, length: int) -> Tensor:
        """(R, 1, length, keys + length): memory tokens of samples `sample` (R,) read all real keys and each other."""
        patches = self.readable[sample][:, None, None, :].expand(-1, -1, length, -1)
        return torch.cat([patches, patches.new_ones(len(sample), 1, length, length)], dim=-1)


@dataclass
class Inputs:
    """S prompts as the processor makes them, right-padded to L: no weight was used, so any thread may make them."""

    ids: Tensor  # (S, L)
    positions: Tensor  # (3, S, L)
    mask: Tensor  # (S, L) bool
    visual: Tensor  # (S, L) bool, True at image and video tokens, those that `mask` leaves out too
    vision: VisionInput  # of the whole images, also where the prompts have coarse ones
    more: Any  # what the family's `features` takes besides


@dataclass
class Prompt:
    """S prompts ready for the language model, right-padded to L."""

    embeds: Tensor  # (S, L, d), image features in their places
    positions: Tensor  # (3, S, L)
    mask: Tensor  # (S, L) bool
    visual: Tensor  # (S, L) bool, True at image and video tokens
    vision: VisionInput  # of the whole images, also where `embeds` has coarse ones

    def next_position(self) -> Tensor:
        """(S,) the position of the first answer token: the largest of the prompt, plus one."""
        return following(self.positions, self.mask)


def following(positions: Tensor, mask: Tensor) -> Tensor:
    """(S,) the largest of the positions (3, S, L) that `mask` (S, L) keeps, plus one."""
    largest: Tensor = positions.masked_fill(~mask, -1).amax(dim=(0, 2))
    return largest + 1


def right_padded(ids: Tensor, mask: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """The ids (S, L) that `mask` (S, L) keeps, moved to the left, and their mask: (S, longest) each."""
    lengths = mask.sum(1)
    right = torch.arange(int(lengths.max()), device=ids.device) < lengths[:, None]
    padded = ids.new_full(right.shape, padding)
    padded[right] = ids[mask]
    return padded, right


def without_surplus(mask: Tensor, visual: Tensor, counts: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """The mask (S, L) without the last visual tokens of images that have more than `wanted`.

    `counts`: the tokens of each image, in order, that `visual` (S, L) marks.
    """
    rank = torch.cat([torch.arange(0), *map(torch.arange, counts)])
    most = torch.tensor(wanted, dtype=torch.long).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    return mask.masked_scatter(visual, (rank < most).to(mask.device))


class Backbone(ABC):
    """A VLM of one family, frozen. `model` is the Hugging Face model, `processor` its processor."""

    takes_video = False
    prompt_pixels: int | None = None  # most pixels of an image (a video's frame) in a prompt; None: no maximum
    image_markers = 1  # tokens that open an image in a prompt, and as many that close it
    three_axes = False  # whether the language model's positions are time, height and width, or one number
    merge: int  # g, patch tokens that the projector merges into one
    blocks: Any  # of the vision encoder, as far as the projector needs them
    heads: int  # of each of them
    processes = 1  # that hold the language model together, and do the same work

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.family: str = model.config.model_type
        self.settings = model.config.vision_config
        self.width = int(model.config.text_config.hidden_size)  # d, of the language model
        self.vision_width = int(self.settings.hidden_size)  # w, of the vision encoder
        self.embedding: nn.Embedding = model.get_input_embeddings()  # kept: Hugging Face searches at every call
        self.head: nn.Linear = model.get_output_embeddings()
        if "sliding_attention" in (getattr(model.config.text_config, "layer_types", None) or ()):
            raise UserError(f"a {self.family} whose language model uses sliding-window attention is not supported")

    @abstractmethod
    def inputs(
        self, texts: list[str], images: list[list[Any]], videos: list[list[Clip]], whole: bool = False
    ) -> Inputs:
        """Encode chat-formatted texts with their PIL images and videos.

        An image of more than `prompt_pixels` is shown coarse, unless `whole`: the family says how. The prompt's
        `vision` is whole in any case. A family that takes no video is given none.
        """

    @abstractmethod
    def limit_pixels(self, pixels: int) -> None:
        """Let the processor make no more of an image (a video's frame) than so many pixels, from now on.

        One tile, or one merged patch, is left in any case.
        """

    @abstractmethod
    def patch_counts(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """The patches that images of one sample make, given their (width, height). RequestError for one without."""

    @abstractmethod
    def features(self, inputs: Inputs) -> Tensor | None:
        """The images and videos in the prompts as image tokens (n, d), in order: runs the vision encoder once."""

    def placed(self, inputs: Inputs, features: Tensor | None) -> Prompt:
        """The prompts, with the features in their places; None where there is no image or video."""
        embeds = self.embedding(inputs.ids)
        if features is not None:
            embeds = embeds.masked_scatter(inputs.visual[..., None], features.to(embeds.dtype))
        return Prompt(embeds, inputs.positions, inputs.mask, inputs.visual & inputs.mask, inputs.vision)

    def prompt_of(self, ids: Tensor, mask: Tensor, pixels: Tensor, grids: Tensor) -> Prompt:
        """The prompts from what the processor makes of them: ids and mask (S, L), padded on any side, and the images.

        UserError for a family that has not implemented it.
        """
        raise UserError(f"a base of family '{self.family}' takes images and text, not a processor's output")

    @abstractmethod
    def patch_stream(self, vision: VisionInput) -> PatchStream:
        """Run the patches through the vision encoder (with whatever adapter is active)."""

    def through(self, block: Callable[..., Any], *args: Any) -> Any:
        """Run a block of the vision encoder, or a part of VisMem; `checkpointed` lets it run again, backwards."""
        return block(*args)

    @abstractmethod
    def memory_stream(self, tokens: Tensor, positions: Tensor, stream: PatchStream, sample: Tensor) -> Tensor:
        """Run extra tokens (R, T, w) beside the patches of samples `sample` (R,): they read patches, never reversely.

        `positions` (R, T, 2) are their rotary positions, negative for the identity; encoders without ignore them.
        Returns (R, T, w), as the projector takes it.
        """

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:
        """The family's own projector: (R, g * N, w) to (R, N, d)."""

    def language(self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """Last hidden states (R, L, d) of embeddings (R, L, d); positions (3, R, L); mask (R, 1, L, keys) bool."""
        output = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions if self.three_axes else positions[0],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    @cached_property
    def step(self) -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
        """`language` for one token per row, faster where the decoder is a known one."""
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

    def without_patches(self, vision: VisionInput) -> PatchStream:
        """The stream of samples none of which has an image."""
        samples, weight = len(vision.image), self.embedding.weight
        embeds = weight.new_zeros(samples, 0, self.vision_width)
        none = weight.new_zeros(samples, self.heads, 0, self.vision_width // self.heads)
        keys_values = [(none, none)] * len(self.blocks)
        return PatchStream(embeds, keys_values, weight.new_zeros(samples, 0, self.width), vision, vision.mask)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device
