"""LLaVA-OneVision: SigLIP tiles of any-resolution images, a plain MLP as the projector, packed with line ends."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from vismem.errors import UserError
from vismem.models.backbones.tiles import TiledBackbone


class LlavaOnevisionBackbone(TiledBackbone):
    """See Backbone. A sample's only image is cut into tiles; several images are one tile each, as in its training."""

    layers_name, attention_name, convolution_name = "layers", "self_attn", "patch_embedding"
    image_markers = 0
    side = 1

    def __init__(self, model: Any, processor: Any) -> None:
        if model.config.vision_config.model_type != "siglip_vision_model":
            raise UserError(
                "a LLaVA-OneVision needs a SigLIP vision encoder (siglip_vision_model), "
                f"but this one has '{model.config.vision_config.model_type}'"
            )
        super().__init__(model, processor)

    def _tile_counts(self, encoded: Any) -> list[int]:
        """Tiles of each image; the processor cuts only an image that is alone in its sample."""
        alone = [count == 1 for count in encoded["batch_num_images"].tolist() for _ in range(count)]
        pinpoints, size = self.model.config.image_grid_pinpoints, self.settings.image_size
        return [
            image_size_to_num_patches(shape, pinpoints, size) if cut else 1
            for shape, cut in zip(encoded["image_sizes"].tolist(), alone, strict=True)
        ]

    def _tiles(self, encoded: Any, images: list[list[Any]]) -> tuple[Tensor, list[int]]:
        counts = self._tile_counts(encoded)
        pixels = torch.cat([image[:count] for image, count in zip(encoded["pixel_values"], counts, strict=True)])
        each = iter(counts)
        return pixels, [sum(next(each) for _ in row) for row in images]

    def _features(self, hidden: Tensor, encoded: Any) -> Tensor:
        projected: Tensor = self.project(hidden)
        if self.model.config.vision_feature_select_strategy == "default":
            projected = projected[:, 1:]
        packed, _ = self.model.model.pack_image_features(
            torch.split(projected, self._tile_counts(encoded)),
            encoded["image_sizes"],
            image_newline=self.model.model.image_newline,
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        return torch.cat(packed)

    def _placed(self, embedded: Tensor) -> Tensor:
        hidden: Tensor = embedded + self.tower.embeddings.position_embedding.weight
        return hidden

    def _qkv(self, block: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, normed = block.self_attn, block.layer_norm1(hidden)
        return attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)

    def _rest(self, block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + block.self_attn.out_proj(attended)
        result: Tensor = hidden + block.mlp(block.layer_norm2(hidden))
        return result
