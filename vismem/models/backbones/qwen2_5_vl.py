"""Qwen2.5-VL: windowed vision encoder with fused qkv, 2x2 merger, three-axis rotary positions."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from vismem.errors import UserError
from vismem.models.backbones.base import (
    Backbone,
    Clip,
    Inputs,
    PatchStream,
    Prompt,
    VisionInput,
    right_padded,
    without_surplus,
)
from vismem.models.backbones.pixels import Patches, Pixels
from vismem.models.backbones.segments import Segments, attend, segments
from vismem.models.lora import LoraTarget
from vismem.runtime.images import size_after_resizing


class Qwen25VLBackbone(Backbone):
    """See Backbone. The vision encoder runs over equal-length rows, batched over images and windows.

    A coarse image is the whole one, as the processor resizes it, resized once more by the same rule and filter.
    """

    takes_video = three_axes = True

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.visual = model.model.visual
        self.blocks, self.heads = self.visual.blocks, int(self.settings.num_heads)
        self.merge = int(self.settings.spatial_merge_size) ** 2
        self.frames = int(self.settings.temporal_patch_size)  # that make one temporal patch
        self._layout = lru_cache(maxsize=256)(self._layout_of)

    @property
    def patches(self) -> Patches:
        """Cuts images and videos into patches."""
        return Patches(self.processor.image_processor, self.frames, self.device)

    # --- the prompt ---

    def limit_pixels(self, pixels: int) -> None:
        processor = self.processor.image_processor
        low, high = (min(processor.size[edge], pixels) for edge in ("shortest_edge", "longest_edge"))
        processor.size = type(processor.size)(shortest_edge=low, longest_edge=high)

    def inputs(
        self, texts: list[str], images: list[list[Any]], videos: list[list[Clip]], whole: bool = False
    ) -> Inputs:
        # As the processor does it, but for videos, which it takes only where torchvision is installed.
        processor = self.processor
        each = iter(self.patches.images([image for row in images for image in row]))
        pictures = [list(islice(each, len(row))) for row in images]
        clips = [[self.patches.video(clip) for clip in row] for row in videos]
        placed, _ = processor.get_text_with_replacements(
            list(texts),
            images_replacements=self._places(processor.image_token, texts, pictures),
            videos_replacements=self._places(processor.video_token, texts, clips),
        )
        encoded = processor.tokenizer(placed, padding=True, padding_side="right", return_tensors="pt").to(self.device)
        return self._inputs(encoded["input_ids"], encoded["attention_mask"].bool(), pictures, clips, videos, whole)

    def prompt_of(self, ids: Tensor, mask: Tensor, pixels: Tensor, grids: Tensor) -> Prompt:
        padded, right = right_padded(ids, mask.bool(), self.processor.tokenizer.pad_token_id)
        sizes = [tuple(grid) for grid in grids.tolist()]
        if (cut := [t * h * w for t, h, w in sizes]) and sum(cut) != len(pixels):
            raise UserError(f"image_grid_thw counts {sum(cut)} patches, pixel_values has {len(pixels)}")
        parts = torch.split(pixels, cut)
        each = iter(zip(parts, sizes, strict=True))
        counts = (padded == self.model.config.vision_start_token_id).sum(1).tolist()
        pictures = [list(islice(each, count)) for count in counts]
        self._check_tokens(padded, pictures, len(parts) - sum(counts))
        inputs = self._inputs(padded, right, pictures, [[]] * len(ids), [[]] * len(ids), whole=False)
        return self.placed(inputs, self.features(inputs))

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

    def _inputs(
        self,
        ids: Tensor,
        mask: Tensor,
        pictures: list[list[Pixels]],
        clips: list[list[Pixels]],
        videos: list[list[Clip]],
        whole: bool,
    ) -> Inputs:
        """The prompts whose ids (S, L) have a token for every merged patch of the whole images and videos."""
        settings = self.model.config
        vision = shown = self._vision_input(_rows(pictures, clips))
        if self.prompt_pixels is not None and not whole:
            visual = mask & ((ids == settings.image_token_id) | (ids == settings.video_token_id))
            counts = self._counts(pictures, clips)
            pictures, clips = (self.patches.shrunk(rows, self.prompt_pixels) for rows in (pictures, clips))
            mask = without_surplus(mask, visual, counts, self._counts(pictures, clips))
            ids, mask = right_padded(ids, mask, self.processor.tokenizer.pad_token_id)
            shown = self._vision_input(_rows(pictures, clips))
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
        packed = shown
        if shown.image.shape[1]:
            single = self._vision_input([[item] for row in _rows(pictures, clips) for item in row])
            packed = min(single, shown, key=lambda packed: packed.mask.numel())  # the less padding, the faster
        return Inputs(ids, positions, mask, image | video, vision, packed)

    def patch_counts(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        processor = self.processor.image_processor
        resized = (size_after_resizing(size, processor, f"image {number}") for number, size in enumerate(sizes, 1))
        return [width * height // processor.patch_size**2 for width, height in resized]

    def features(self, inputs: Inputs) -> Tensor | None:
        packed: VisionInput = inputs.more
        if not packed.image.shape[1]:
            return None
        return self.patch_stream(packed).features[packed.mask[:, :: self.merge]]

    def _counts(self, pictures: list[list[Pixels]], clips: list[list[Pixels]]) -> list[int]:
        """The tokens of each image and video, in the order of the prompts."""
        return [len(patches) // self.merge for row in _rows(pictures, clips) for patches, _ in row]

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
        images, windows = segments(vision.image), segments(vision.window)
        hidden, kept = embeds, []
        for block, whole in self._blocks():
            places = images if whole else windows
            hidden, key, value = self.through(self._block, block, hidden, rotary, places)
            if whole:  # in the others memory tokens are a window of their own
                kept.append((key, value))
        return PatchStream(embeds, kept, self.through(self.project, hidden), vision, vision.mask)

    def _blocks(self) -> list[tuple[Any, bool]]:
        """The blocks in order, and whether attention in them is over the whole image."""
        return [(block, index in self.visual.fullatt_block_indexes) for index, block in enumerate(self.blocks)]

    def memory_stream(self, tokens: Tensor, positions: Tensor, stream: PatchStream, sample: Tensor) -> Tensor:
        rows, length, _ = tokens.shape
        rotary = self._rotary(positions)
        mask = stream.memory_mask(sample, length)
        own = mask.new_ones(rows, 1, length, length)
        hidden, kept = tokens.to(stream.embeds.dtype), iter(stream.keys_values)
        for block, whole in self._blocks():
            read = (*next(kept), sample) if whole else ()
            hidden, *_ = self.through(self._block, block, hidden, rotary, mask if whole else own, *read)
        return hidden

    def _block(
        self, block: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], places: Segments, *read: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Patches or memory tokens through a block, with their own keys and values.

        `places`: the keys that each may see. `read`: keys and values of all samples' patches, and the rows' samples.
        """
        query, own_key, own_value = self._qkv(block, hidden, rotary)
        key, value = own_key, own_value
        if read:
            keys, values, sample = read
            key, value = torch.cat([keys[sample], key], dim=2), torch.cat([values[sample], value], dim=2)
        return self._rest(block, hidden, attend(query, key, value, places)), own_key, own_value

    def project(self, hidden: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        merged: Tensor = self.visual.merger(hidden.reshape(rows * length, width))
        return merged.view(rows, length // self.merge, merged.shape[-1])  # a call without images has length 0

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (R, T, head width); the identity where a position is negative.

        Hugging Face's own has no gradient, and a look has positions that are learnt.
        """
        rotary = self.visual.rotary_pos_emb
        angles = (positions.clamp(min=0)[..., None] * rotary.inv_freq).flatten(-2)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    def _qkv(self, block: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        rows, length, _ = hidden.shape
        fused = block.attn.qkv(block.norm1(hidden)).view(rows, length, 3, block.attn.num_heads, -1)
        query, key, value = fused.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    @staticmethod
    def _rest(block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
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


def _rows(pictures: list[list[Pixels]], clips: list[list[Pixels]]) -> list[list[Pixels]]:
    """Each sample's images, then its videos."""
    return [[*seen, *watched] for seen, watched in zip(pictures, clips, strict=True)]


def _grids(rows: list[list[Pixels]]) -> Tensor | None:
    """(n, 3) time, height and width of each; None where there are none."""
    grids = [grid for row in rows for _, grid in row]
    return torch.tensor(grids) if grids else None
