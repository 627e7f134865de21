"""Qwen2.5-VL's images and videos as patches, as its image processor cuts them; and patches shrunk."""

from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vismem.models.backbones.base import Clip
from vismem.runtime.images import coarse_grid

Pixels = tuple[Tensor, tuple[int, int, int]]  # an image's or video's patches (t * h * w, values), and t, h and w


class Patches:
    """Cuts images and videos. `processor` is the image processor; `frames` of a video make one temporal patch."""

    def __init__(self, processor: Any, frames: int, device: torch.device) -> None:
        self.processor, self.frames, self.device = processor, frames, device

    def images(self, images: list[Any], resize: bool = True) -> list[Pixels]:
        """Each PIL image's patches; without `resize`, of the image as it is."""
        if not images:
            return []
        count = 1
        more: dict[str, Any] = {} if resize else {"do_resize": False}
        if self.fit(images, resize):  # one above the other they make one image, whose patches are theirs in order
            count, more = len(images), {"do_resize": False, "input_data_format": "channels_first"}
            images = [np.ascontiguousarray(np.concatenate([*map(np.asarray, images)]).transpose(2, 0, 1))]
        encoded = self.processor(images=images, return_tensors="pt", **more).to(self.device)
        grids = [(t, h // count, w) for t, h, w in encoded["image_grid_thw"].tolist() for _ in range(count)]
        patches = encoded["pixel_values"].split([t * h * w for t, h, w in grids])
        return list(zip(patches, grids, strict=True))

    def fit(self, images: list[Any], resize: bool = True) -> bool:
        """Whether images are of one size, and of one that the processor would not change if it were to `resize`."""
        size, bounds = images[0].size, self.processor.size
        alike = all(image.size == size for image in images)
        return alike and (
            not resize or smart_resize(*size, self._block, bounds["shortest_edge"], bounds["longest_edge"]) == size
        )

    def video(self, clip: Clip) -> Pixels:
        """A video's patches, of several frames each; its last frame is repeated until they are full."""
        return self._joined(self.images([*clip.frames, *clip.frames[-1:] * (-len(clip.frames) % self.frames)]))

    def shrunk(self, rows: list[list[Pixels]], pixels: int) -> list[list[Pixels]]:
        """The same images or videos, each frame resized to at most `pixels` by the processor's own rule and filter.

        One that has no more stays as it is; none becomes less than one merged patch high or wide.
        """
        items = [item for row in rows for item in row]
        smaller = [self._smaller(item, pixels) for item in items]
        cut = iter(self.images([frame for frames in smaller for frame in frames], resize=False))
        coarse = []
        for item, frames in zip(items, smaller, strict=True):
            each = list(islice(cut, len(frames)))
            times = item[1][0] * self.frames // max(1, len(frames))  # that a frame is repeated
            coarse.append(self._joined([one for one in each for _ in range(times)]) if frames else item)
        found = iter(coarse)
        return [list(islice(found, len(row))) for row in rows]

    def _smaller(self, item: Pixels, pixels: int) -> list[Image.Image]:
        """The frames of an image or video that has more than so many pixels, resized; of another none."""
        (_, rows, columns), processor = item[1], self.processor
        coarse = coarse_grid((rows, columns), pixels, processor.patch_size, processor.merge_size)
        if coarse == (rows, columns):
            return []
        size = (coarse[1] * processor.patch_size, coarse[0] * processor.patch_size)
        return [frame.resize(size, processor.resample) for frame in self._frames_of(*item)]

    @property
    def _block(self) -> int:
        """The side in pixels of what is merged into one token."""
        return int(self.processor.patch_size * self.processor.merge_size)

    def _frames_of(self, patches: Tensor, grid: tuple[int, int, int]) -> list[Image.Image]:
        """The frames that the patches were cut from, to the bit; of an image, which fills its temporal patch, one."""
        time, height, width = grid
        side, merge = self.processor.patch_size, self.processor.merge_size
        blocks = patches.view(time, height // merge, width // merge, merge, merge, -1, self.frames, side, side)
        cells = blocks.permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
        cells = cells[:, :1] if cells.equal(cells[:, :1].expand_as(cells)) else cells
        values = cells.reshape(-1, height * side, width * side, cells.shape[-1]).float().cpu().numpy()
        if self.processor.do_normalize:
            values = values * np.float32(self.processor.image_std) + np.float32(self.processor.image_mean)
        if self.processor.do_rescale:
            values = values / self.processor.rescale_factor
        return [Image.fromarray(frame) for frame in values.round().clip(0, 255).astype(np.uint8)]

    def _joined(self, cut: list[Pixels]) -> Pixels:
        """The patches of a video from those of its frames, cut as images.

        In an image's patches the image stands once for every frame of a temporal patch: of each frame one is kept.
        """
        _, height, width = cut[0][1]
        time, area, values = len(cut) // self.frames, height * width, self.processor.patch_size**2
        every = torch.stack([patches for patches, _ in cut]).view(len(cut), area, -1, self.frames, values)[:, :, :, 0]
        joined = every.view(time, self.frames, area, -1, values).permute(0, 2, 3, 1, 4)
        return joined.reshape(time * area, -1), (time, height, width)
