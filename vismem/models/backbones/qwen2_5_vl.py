"""Qwen2.5-VL: windowed vision encoder with fused qkv, 2x2 merger, three-axis rotary positions."""

from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from vismem.errors import UserError
from vismem.models.backbones.base import Backbone, Clip, PatchStream, Prompt, VisionInput
from vismem.models.lora import LoraTarget

Pixels = tuple[Tensor, tuple[int, int, int]]  # an image's or video's patches (t * h * w, values), and t, h and w


class Qwen25VLBackbone(Backbone):
    """See Backbone. The vision encoder runs as dense masked attention over equal-length rows, batched over images."""

    takes_video = three_axes = True

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.visual = model.model.visual
        self.blocks, self.heads = self.visual.blocks, int(self.settings.num_heads)
        self.merge = int(self.settings.spatial_merge_size) ** 2
        self.frames = int(self.settings.temporal_patch_size)  # that make one temporal patch
        self._layout = lru_cache(maxsize=256)(self._layout_of)

    # --- the prompt ---

    def prompt(self, texts: list[str], images: list[list[Any]], videos: list[list[Clip]]) -> Prompt:
        # As the processor does it, but for videos, which it takes only where torchvision is installed.
        processor = self.processor
        each = iter(self._pixels([image for row in images for image in row]))
        pictures = [list(islice(each, len(row))) for row in images]
        clips = [[self._clip(clip) for clip in row] for row in videos]
        placed, _ = processor.get_text_with_replacements(
            list(texts),
            images_replacements=self._places(processor.image_token, texts, pictures),
            videos_replacements=self._places(processor.video_token, texts, clips),
        )
        encoded = processor.tokenizer(placed, padding=True, padding_side="right", return_tensors="pt").to(self.device)
        return self._prompt(encoded["input_ids"], encoded["attention_mask"].bool(), pictures, clips, videos)

    def prompt_of(self, ids: Tensor, mask: Tensor, pixels: Tensor, grids: Tensor) -> Prompt:
        lengths = mask.sum(1)
        right = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # the padding's side
        padded = ids.new_full(ids.shape, self.processor.tokenizer.pad_token_id)
        padded[right] = ids[mask.bool()]
        sizes = [tuple(grid) for grid in grids.tolist()]
        parts = torch.split(pixels, [t * h * w for t, h, w in sizes])
        each = iter(zip(parts, sizes, strict=True))
        counts = (padded == self.model.config.vision_start_token_id).sum(1).tolist()
        pictures = [list(islice(each, count)) for count in counts]
        self._check_tokens(padded, pictures, len(parts) - sum(counts))
        return self._prompt(padded, right, pictures, [[]] * len(ids), [[]] * len(ids))

    def _check_tokens(self, ids: Tensor, pictures: list[list[Pixels]], left: int) -> None:
        """UserError where ids (S, L) have other image tokens than the images' patches need, or any of a video."""
        settings = self.model.config
        needed = [sum(len(patches) // self.merge for patches, _ in row) for row in pictures]
        found = (ids == settings.image_token_id).sum(1).tolist()
        if left or needed != found or (ids == settings.video_token_id).any():
            raise UserError(
                f"input_ids have {found} image tokens a prompt where the images make {needed}, or tokens of a video: "
                "each image stands once in the text, and nowhere else may the text hold such a token"
            )

    def _prompt(
        self,
        ids: Tensor,
        mask: Tensor,
        pictures: list[list[Pixels]],
        clips: list[list[Pixels]],
        videos: list[list[Clip]],
    ) -> Prompt:
        settings = self.model.config
        seconds = [self.frames / clip.fps for row in videos for clip in row]
        image, video = ids == settings.image_token_id, ids == settings.video_token_id
        positions, _ = self.model.model.get_rope_index(
            ids,
            image + 2 * video,
            image_grid_thw=_grids(pictures),
            video_grid_thw=_grids(clips),
            second_per_grid_ts=torch.tensor(seconds) if seconds else None,
            attention_mask=mask.long(),
        )
        embeds = self.embedding(ids)
        visual = image | video
        rows = [[*seen, *watched] for seen, watched in zip(pictures, clips, strict=True)]
        vision = self._vision_input(rows)
        if vision.image.shape[1]:
            single = self._vision_input([[item] for row in rows for item in row])
            padded = min(single, vision, key=lambda packed: packed.mask.numel())  # the less padding, the faster
            features = self.project(self.patch_stream(padded).hidden)[padded.mask[:, :: self.merge]]
            embeds = embeds.masked_scatter(visual[..., None], features.to(embeds.dtype))
        return Prompt(embeds, positions, mask, visual & mask, vision)

    def _pixels(self, images: list[Any]) -> list[Pixels]:
        """Each image's patches."""
        if not images:
            return []
        processor, count, more = self.processor.image_processor, 1, {}
        if self._fit(images):  # one above the other they make one image, whose patches are theirs in order
            count, more = len(images), {"do_resize": False, "input_data_format": "channels_first"}
            images = [np.ascontiguousarray(np.concatenate([*map(np.asarray, images)]).transpose(2, 0, 1))]
        encoded = processor(images=images, return_tensors="pt", **more).to(self.device)
        grids = [(t, h // count, w) for t, h, w in encoded["image_grid_thw"].tolist() for _ in range(count)]
        patches = encoded["pixel_values"].split([t * h * w for t, h, w in grids])
        return list(zip(patches, grids, strict=True))

    def _fit(self, images: list[Any]) -> bool:
        """Whether images are of one size, and of one that the processor would not change."""
        processor, size = self.processor.image_processor, images[0].size
        side = processor.patch_size * processor.merge_size
        bounds = processor.size["shortest_edge"], processor.size["longest_edge"]
        return all(image.size == size for image in images) and smart_resize(*size, side, *bounds) == size

    def _clip(self, clip: Clip) -> Pixels:
        """A video's patches, of several frames each; its last frame is repeated until they are full.

        In an image's patches the image stands once for every frame of a temporal patch: of each frame one is kept.
        """
        frames = [*clip.frames, *clip.frames[-1:] * (-len(clip.frames) % self.frames)]
        cut = self._pixels(frames)
        _, height, width = cut[0][1]
        area, channels, values = height * width, int(self.settings.in_channels), int(self.settings.patch_size) ** 2
        frame = torch.stack([patches for patches, _ in cut]).view(-1, area, channels, self.frames, values)[:, :, :, 0]
        time = len(frames) // self.frames
        joined = frame.view(time, self.frames, area, channels, values).permute(0, 2, 3, 1, 4)
        return joined.reshape(time * area, -1), (time, height, width)

    def _places(self, token: str, texts: list[str], rows: list[list[Pixels]]) -> list[str]:
        """What stands for each image (or each video) in the texts: its token, once for every merged patch."""
        for text, row in zip(texts, rows, strict=True):
            if text.count(token) != len(row):
                raise UserError(
                    f"a prompt has {text.count(token)} x {token} for {len(row)} of them: the base's chat template must "
                    f"place each once. The prompt begins: {text[:200]!r}"
                )
        return [token * (len(patches) // self.merge) for row in rows for patches, _ in row]

    def _layout_of(self, t: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions (P, 2), frame (P,) and window (P,) of one image's (or video's) patches in merge order."""
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

    def _vision_input(self, rows: list[list[Pixels]]) -> VisionInput:
        """Pack the patches of each sample's images and videos, right-padded."""
        samples, device = len(rows), self.device
        longest = max(sum(len(patches) for patches, _ in row) for row in rows)
        values = next((patches.shape[-1] for row in rows for patches, _ in row), 1)
        vision = VisionInput(
            torch.zeros(samples, longest, values, device=device),
            torch.zeros(samples, longest, 2, dtype=torch.long, device=device),
            torch.full((samples, longest), -1, device=device),
            torch.full((samples, longest), -1, device=device),
        )
        for number, row in enumerate(rows):
            place = frames = windows = 0
            for patches, grid in row:
                positions, frame, window = self._layout(*grid)
                here = slice(place, place + len(patches))
                vision.patches[number, here] = patches
                vision.positions[number, here] = positions.to(device)
                vision.image[number, here] = frame.to(device) + frames
                vision.window[number, here] = window.to(device) + windows
                frames, windows = frames + int(frame[-1]) + 1, windows + int(window.max()) + 1
                place = here.stop
        return vision

    # --- the vision encoder ---

    def patch_stream(self, vision: VisionInput) -> PatchStream:
        if not vision.image.shape[1]:
            return self.without_patches(vision)
        kernel = self.visual.patch_embed.proj.weight.flatten(1)  # a convolution over one patch, several times faster so
        embeds = nn.functional.linear(vision.patches.to(kernel.dtype), kernel)
        rotary = self._rotary(vision.positions)
        same_image = vision.image[:, None, :, None] == vision.image[:, None, None, :]
        same_window = vision.window[:, None, :, None] == vision.window[:, None, None, :]
        hidden, kept = embeds, []
        for index, block in enumerate(self.blocks):
            query, key, value = self._qkv(block, hidden, rotary)
            kept.append((key, value))
            mask = same_image if index in self.visual.fullatt_block_indexes else same_window
            hidden = self._rest(block, hidden, query, key, value, mask)
        return PatchStream(embeds, kept, hidden, vision, vision.mask)

    def memory_stream(self, tokens: Tensor, positions: Tensor, stream: PatchStream, sample: Tensor) -> Tensor:
        rows, length, _ = tokens.shape
        rotary = self._rotary(positions)
        mask = stream.memory_mask(sample, length)
        own = mask.new_ones(rows, 1, length, length)
        hidden = tokens.to(stream.embeds.dtype)
        for index, (block, (key, value)) in enumerate(zip(self.blocks, stream.keys_values, strict=True)):
            query, own_key, own_value = self._qkv(block, hidden, rotary)
            if index in self.visual.fullatt_block_indexes:
                keys = torch.cat([key[sample], own_key], dim=2)
                values = torch.cat([value[sample], own_value], dim=2)
                hidden = self._rest(block, hidden, query, keys, values, mask)
            else:
                hidden = self._rest(block, hidden, query, own_key, own_value, own)
        return hidden

    def project(self, hidden: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        merged: Tensor = self.visual.merger(hidden.reshape(rows * length, width))
        return merged.view(rows, length // self.merge, -1)

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

    def vision_targets(self) -> list[LoraTarget]:
        width = self.vision_width
        return [
            LoraTarget(f"blocks.{i}.attn.qkv", block.attn.qkv, start, start + width)
            for i, block in enumerate(self.blocks)
            for start in (0, 2 * width)
        ]


def _grids(rows: list[list[Pixels]]) -> Tensor | None:
    """(n, 3) time, height and width of each; None where there are none."""
    grids = [grid for row in rows for _, grid in row]
    return torch.tensor(grids) if grids else None
