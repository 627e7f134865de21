"""LLaVA-OneVision: SigLIP tiles of any-resolution images, a plain MLP as the projector, packed with line ends."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from vismem.errors import UserError
from vismem.models.backbones.base import right_padded, without_surplus
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

    def limit_pixels(self, pixels: int) -> None:
        """Of the cuts those are left whose tiles, with the view of the whole image, fit; the smallest in any case."""
        config, tile = self.model.config, self.settings.image_size**2
        cuts = sorted(config.image_grid_pinpoints, key=lambda cut: cut[0] * cut[1])  # stable
        left = [cut for cut in cuts if cut[0] * cut[1] + tile <= pixels] or cuts[:1]
        kept = [cut for cut in config.image_grid_pinpoints if cut in left]
        config.image_grid_pinpoints = self.processor.image_processor.image_grid_pinpoints = kept

    def _tile_counts(self, encoded: Any) -> list[int]:
        """Tiles of each image; the processor cuts only an image that is alone in its sample."""
        if "tiles" in encoded:
            return list(encoded["tiles"])
        sizes = iter(encoded["image_sizes"].tolist())
        return [
            tiles for count in encoded["batch_num_images"].tolist() for tiles in self._tiles_of([*islice(sizes, count)])
        ]

    def patch_counts(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        tiles = self._tiles_of([(height, width) for width, height in sizes])
        return [count * (self.settings.image_size // self.patch_size) ** 2 for count in tiles]

    def _tiles_of(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """How many tiles each image of a sample makes, given their sizes (height, width)."""
        if len(sizes) != 1:
            return [1] * len(sizes)
        pinpoints, side = self.model.config.image_grid_pinpoints, self.settings.image_size
        return [image_size_to_num_patches(sizes[0], pinpoints, side)]

    def _tiles(self, encoded: Any, images: list[list[Any]]) -> tuple[Tensor, list[int]]:
        counts = self._tile_counts(encoded)
        pixels = torch.cat([image[:count] for image, count in zip(encoded["pixel_values"], counts, strict=True)])
        each = iter(counts)
        return pixels, [sum(next(each) for _ in row) for row in images]

    def _coarse(self, encoded: Any, texts: list[str], images: list[list[Any]], pixels: int) -> Any:
        """Of an image whose tiles do not fit only the first is left, the view of all of it, and one line end."""
        processor, ids, mask = self.processor, encoded["input_ids"], encoded["attention_mask"].bool()
        area, counts = self.settings.image_size**2, self._tile_counts(encoded)
        tiles = [count if count * area <= pixels else 1 for count in counts]
        places = [processor.replace_image_token(encoded, number) for number in range(len(tiles))]
        tokens = [place.count(processor.image_token) for place in places]
        view = processor.num_image_tokens + 1 - (processor.vision_feature_select_strategy == "default")
        left = [view if kept == 1 else token for token, kept in zip(tokens, tiles, strict=True)]
        mask = without_surplus(mask, mask & (ids == self.model.config.image_token_id), tokens, left)
        ids, mask = right_padded(ids, mask, processor.tokenizer.pad_token_id)
        return {**encoded, "input_ids": ids, "attention_mask": mask, "tiles": tiles}

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
