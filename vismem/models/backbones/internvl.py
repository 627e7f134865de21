"""InternVL 3 and 3.5: tiles with a class token, pixel shuffle of 2x2 patches into the projector."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vismem.errors import UserError
from vismem.models.backbones.tiles import TiledBackbone


class InternVLBackbone(TiledBackbone):
    """See Backbone. Merge order is the pixel shuffle's: s x s neighbours, row by row, are one token's channels."""

    layers_name, attention_name, convolution_name = "layer", "attention", "patch_embeddings.projection"

    def __init__(self, model: Any, processor: Any) -> None:
        config = model.config
        if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
            raise UserError(
                "an InternVL needs vision_feature_layer to be one number and vision_feature_select_strategy 'default', "
                f"but this one has {config.vision_feature_layer} and '{config.vision_feature_select_strategy}'"
            )
        self.side = int(1 / config.downsample_ratio)
        super().__init__(model, processor)

    def _tiles(self, encoded: Any, images: list[list[Any]]) -> tuple[Tensor, list[int]]:
        tokens = (encoded["input_ids"] == self.model.config.image_token_id).sum(1)
        return encoded["pixel_values"], (tokens // self.processor.image_seq_length).tolist()

    def patch_counts(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        shapes = [(height, width) for width, height in sizes]
        tiles = self.processor._get_num_multimodal_tokens(image_sizes=shapes).num_image_patches  # as it is asked to cut
        return [count * self.processor.image_seq_length * self.merge for count in tiles]

    def _coarse(self, encoded: Any, texts: list[str], images: list[list[Any]], pixels: int) -> Any:
        """Cut anew into fewer tiles, as many as fit; from three on, one of them is the thumbnail."""
        return self._encoded(texts, images, **self._tiles_within(pixels))

    def limit_pixels(self, pixels: int) -> None:
        for name, count in self._tiles_within(pixels).items():
            setattr(self.processor.image_processor, name, count)

    def _tiles_within(self, pixels: int) -> dict[str, int]:
        processor = self.processor.image_processor
        fit = pixels // (processor.size["height"] * processor.size["width"])
        most = max(1, min(processor.max_patches, fit - 1))
        return {"max_patches": most, "min_patches": min(processor.min_patches, most)}

    def _features(self, hidden: Tensor, encoded: Any) -> Tensor:
        return self.project(hidden).flatten(0, 1)

    def _placed(self, embedded: Tensor) -> Tensor:
        embeddings = self.tower.embeddings
        tiles, count, _ = embedded.shape
        hidden = torch.cat([embeddings.cls_token.expand(tiles, -1, -1), embedded], dim=1)
        if embeddings.position_embeddings is not None:
            size = round(count**0.5) * self.patch_size
            positions = embeddings.interpolate_pos_encoding(hidden, size, size)
            hidden = hidden + torch.cat([positions[:, :1], positions[:, 1:][:, self._order(count)]], dim=1)
        return hidden

    def _qkv(self, block: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, normed = block.attention, block.layernorm_before(hidden)
        query, key = attention.q_norm(attention.q_proj(normed)), attention.k_norm(attention.k_proj(normed))
        return query, key, attention.v_proj(normed)

    def _rest(self, block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + block.lambda_1 * block.attention.projection_layer(attended)
        result: Tensor = hidden + block.lambda_2 * block.mlp(block.layernorm_after(hidden))
        return result

    def _select(self, states: Mapping[int, Tensor]) -> Tensor:
        selected = super()._select(states)
        last = self.model.config.vision_feature_layer == -1
        return self.tower.layernorm(selected) if last else selected
