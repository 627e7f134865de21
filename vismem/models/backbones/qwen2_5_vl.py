"""Qwen2.5-VL: windowed vision encoder with fused qkv, 2x2 merger, three-axis rotary positions."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from vismem.models.backbones.base import Backbone, PatchStream, Prompt, VisionInput
from vismem.models.lora import LoraTarget


class Qwen25VLBackbone(Backbone):
    """See Backbone. The vision encoder runs as dense masked attention over equal-length rows, batched over images."""

    family = "qwen2_5_vl"

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.visual = model.model.visual
        self.settings = model.config.vision_config
        self._layout = lru_cache(maxsize=256)(self._layout_of)

    @property
    def merge(self) -> int:
        return int(self.settings.spatial_merge_size) ** 2

    # --- the prompt ---

    def prompt(self, texts: list[str], images: list[list[Any]]) -> Prompt:
        flat = [image for row in images for image in row]
        encoded = self.processor(
            text=texts, images=flat or None, padding=True, padding_side="right", return_tensors="pt"
        ).to(self.device)
        mask = encoded["attention_mask"].bool()
        embeds = self.embedding(encoded["input_ids"])
        grid = encoded.get("image_grid_thw")
        visual = encoded["input_ids"] == self.model.config.image_token_id
        positions, _ = self.model.model.get_rope_index(
            encoded["input_ids"], encoded["mm_token_type_ids"], image_grid_thw=grid, attention_mask=mask.long()
        )
        vision = self._vision_input(encoded.get("pixel_values"), grid, [len(row) for row in images])
        if flat:
            stream = self.patch_stream(vision)
            features = self.project(stream.hidden)[vision.mask[:, :: self.merge]]
            embeds = embeds.masked_scatter(visual[..., None], features.to(embeds.dtype))
        return Prompt(embeds, positions, mask, visual & mask, vision)

    def _layout_of(self, t: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions (P, 2), frame (P,) and window (P,) of one image's patches in merge order."""
        grid = torch.tensor([[t, h, w]])
        positions = get_vision_position_ids(grid, self.settings.spatial_merge_size)
        order, bounds = get_vision_window_index(
            grid, self.settings.spatial_merge_size, self.settings.window_size, self.settings.patch_size
        )
        bounds = bounds.unique_consecutive() // self.merge
        window = torch.empty_like(order)
        window[order] = torch.bucketize(torch.arange(len(order)), bounds[1:], right=True)
        frame = torch.arange(t).repeat_interleave(h * w)
        return positions, frame, window.repeat_interleave(self.merge)

    def _vision_input(self, pixels: Tensor | None, grid: Tensor | None, counts: list[int]) -> VisionInput:
        """Pack the processor's flat patches by sample, right-padded."""
        rows, device = len(counts), self.device
        if pixels is None or grid is None:
            empty = torch.zeros(rows, 0, dtype=torch.long, device=device)
            return VisionInput(torch.zeros(rows, 0, 1, device=device), empty[..., None].expand(-1, -1, 2), empty, empty)
        lengths = grid.prod(-1).tolist()
        total = [sum(lengths[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(rows)]
        longest = max(total)
        vision = VisionInput(
            pixels.new_zeros(rows, longest, pixels.shape[-1]),
            torch.zeros(rows, longest, 2, dtype=torch.long, device=device),
            torch.full((rows, longest), -1, device=device),
            torch.full((rows, longest), -1, device=device),
        )
        taken = image = 0
        for row, count in enumerate(counts):
            place = frames = windows = 0
            for _ in range(count):
                positions, frame, window = self._layout(*grid[image].tolist())
                here = slice(place, place + lengths[image])
                vision.patches[row, here] = pixels[taken : taken + lengths[image]]
                vision.positions[row, here] = positions.to(device)
                vision.image[row, here] = frame.to(device) + frames
                vision.window[row, here] = window.to(device) + windows
                frames, windows = frames + int(frame[-1]) + 1, windows + int(window.max()) + 1
                place, taken, image = here.stop, taken + lengths[image], image + 1
        return vision

    # --- the vision encoder ---

    def patch_stream(self, vision: VisionInput) -> PatchStream:
        samples, length = vision.image.shape
        if not length:
            return self.without_patches(vision, int(self.settings.num_heads), len(self.visual.blocks))
        start = self.visual.patch_embed(vision.patches.reshape(samples * length, -1)).view(samples, length, -1)
        rotary = self._rotary(vision.positions)
        same_image = vision.image[:, None, :, None] == vision.image[:, None, None, :]
        same_window = vision.window[:, None, :, None] == vision.window[:, None, None, :]
        hidden, kept = start, []
        for index, block in enumerate(self.visual.blocks):
            query, key, value = self._qkv(block, hidden, rotary)
            kept.append((key, value))
            hidden = self._rest(block, hidden, query, key, value, same_image if self._full(index) else same_window)
        return PatchStream(start, kept, hidden, vision)

    def memory_stream(self, tokens: Tensor, positions: Tensor | None, stream: PatchStream, sample: Tensor) -> Tensor:
        rows, length, _ = tokens.shape
        if positions is None:
            positions = torch.full((rows, length, 2), -1.0, device=tokens.device)
        rotary = self._rotary(positions)
        own = torch.ones(rows, 1, length, length, dtype=torch.bool, device=tokens.device)
        patches = stream.vision.mask[sample][:, None, None, :].expand(-1, -1, length, -1)
        hidden = tokens.to(stream.start.dtype)
        for index, (block, (key, value)) in enumerate(zip(self.visual.blocks, stream.keys_values, strict=True)):
            query, own_key, own_value = self._qkv(block, hidden, rotary)
            if self._full(index):
                keys = torch.cat([key[sample], own_key], dim=2)
                values = torch.cat([value[sample], own_value], dim=2)
                hidden = self._rest(block, hidden, query, keys, values, torch.cat([patches, own], dim=-1))
            else:
                hidden = self._rest(block, hidden, query, own_key, own_value, own)
        return hidden

    def project(self, hidden: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        merged: Tensor = self.visual.merger(hidden.reshape(rows * length, width))
        return merged.view(rows, length // self.merge, -1)

    def _full(self, index: int) -> bool:
        return index in self.visual.fullatt_block_indexes

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (R, T, head width); the identity where a position is negative."""
        rows, length, _ = positions.shape
        cos, sin = self.visual.rotary_pos_emb(positions, positions.reshape(rows * length, 2))
        identity = (positions[..., :1] < 0).reshape(rows * length, 1)
        cos, sin = cos.masked_fill(identity, 1.0), sin.masked_fill(identity, 0.0)
        return cos.view(rows, length, -1), sin.view(rows, length, -1)

    def _qkv(self, block: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        rows, length, _ = hidden.shape
        fused = block.attn.qkv(block.norm1(hidden)).view(rows, length, 3, block.attn.num_heads, -1)
        query, key, value = fused.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    @staticmethod
    def _rest(block: Any, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + block.attn.proj(attended.transpose(1, 2).flatten(2))
        result: Tensor = hidden + block.mlp(block.norm2(hidden))
        return result

    # --- the language model ---

    def language(self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        masks = {"full_attention": mask, "sliding_attention": mask}
        output = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=masks,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    # --- where adapters go ---

    def vision_targets(self) -> list[LoraTarget]:
        width = self.vision_width
        return [
            LoraTarget(f"blocks.{i}.attn.qkv", block.attn.qkv, start, start + width)
            for i, block in enumerate(self.visual.blocks)
            for start in (0, 2 * width)
        ]
