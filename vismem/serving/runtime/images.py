"""Images to patches, with numpy and Pillow only: bit for bit what transformers' Qwen2VLImageProcessorPil gives.

Also the place of each patch: its row and column for the rotary position, its image and its attention window.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .limits import RequestError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Patches:
    """The patches of one request's images, image after image, the merger's 2x2 blocks together."""

    values: Floats  # (P, channels * temporal * patch * patch)
    positions: Integers  # (P, 2): row and column within the image
    image_ids: Integers  # (P,)
    window_ids: Integers  # (P,): unique over all images
    grids: tuple[tuple[int, int], ...]  # patches (rows, columns) of each image


def cut_patches(images: Sequence[Image.Image], settings: Mapping[str, Any]) -> Patches:
    """Resize, normalise and cut `images`. `settings` is the "image" section of runtime.json.

    There is at least one image. Raises RequestError for one that does not decode, or as `grid_of` does.
    """
    grids = tuple(grid_of(image.size, settings, f"image {number + 1}") for number, image in enumerate(images))
    values, places, window_ids, windows = [], [], [], 0
    for number, (image, grid) in enumerate(zip(images, grids, strict=True)):
        pixels = _decoded(image, f"image {number + 1} of {len(images)}")
        if settings["do_resize"]:
            rows, columns = (side * settings["patch_size"] for side in grid)
            pixels = pixels.resize((columns, rows), resample=settings["resample"])
        values.append(_flat_patches(_normalised(pixels, settings), settings))
        positions, own_windows = _places(grid, settings)
        places.append(positions)
        window_ids.append(own_windows + windows)
        windows += int(own_windows.max()) + 1
    image_ids = np.repeat(np.arange(len(grids)), [len(part) for part in places]).astype(np.int64)
    return Patches(np.concatenate(values), np.concatenate(places), image_ids, np.concatenate(window_ids), grids)


def grid_of(size: tuple[int, int], settings: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Patches (rows, columns) of an image of `size` (width, height) in pixels, which need not be decoded yet.

    Raises RequestError, which calls the image `name`, if one side is more than 200 times the other.
    """
    width, height = size
    if settings["do_resize"]:
        if max(width, height) > 200 * min(width, height):
            raise RequestError(f"{name} is {width}x{height}: one side is over 200 times the other; crop it")
        factor = settings["patch_size"] * settings["merge_size"]
        height, width = target_size(height, width, factor, settings["min_pixels"], settings["max_pixels"])
    return height // settings["patch_size"], width // settings["patch_size"]


def target_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width: multiples of `factor`, the aspect ratio kept, `min_pixels` to `max_pixels` pixels."""
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rows, columns


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise RequestError(f"{name} does not decode: {error}; send the complete file") from None


def _normalised(image: Image.Image, settings: Mapping[str, Any]) -> Floats:
    """(3, height, width); rescaled in double precision and normalised in single, as transformers does."""
    pixels = np.moveaxis(np.array(image), -1, 0).astype(np.float64)
    if settings["do_rescale"]:
        pixels = pixels * settings["rescale_factor"]
    scaled = pixels.astype(np.float32)
    if settings["do_normalize"]:
        mean, std = (np.array(settings[name], np.float32)[:, None, None] for name in ("mean", "std"))
        scaled = (scaled - mean) / std
    return scaled


def _flat_patches(pixels: Floats, settings: Mapping[str, Any]) -> Floats:
    """(rows * columns, channels * temporal * patch * patch) in the order of the merger's blocks."""
    patch, merge, frames = settings["patch_size"], settings["merge_size"], settings["temporal_patch_size"]
    channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(channels, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = np.transpose(blocks, (1, 4, 2, 5, 0, 3, 6))[:, :, :, :, :, None]
    blocks = np.broadcast_to(blocks, (*blocks.shape[:5], frames, *blocks.shape[6:]))
    return np.ascontiguousarray(blocks.reshape(rows * columns, -1))


def _places(grid: tuple[int, int], settings: Mapping[str, Any]) -> tuple[Integers, Integers]:
    """Row and column (P, 2) and window number (P,) of each patch of one image."""
    merge = settings["merge_size"]
    side = settings["window_size"] // merge // settings["patch_size"] * merge  # patches along a window's side
    row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    positions = np.stack([_by_block(row, merge), _by_block(column, merge)], axis=1).astype(np.int64)
    across = -(-grid[1] // side)
    return positions, positions[:, 0] // side * across + positions[:, 1] // side


def _by_block(grid: NDArray[Any], merge: int) -> NDArray[Any]:
    rows, columns = grid.shape
    return grid.reshape(rows // merge, merge, columns // merge, merge).transpose(0, 2, 1, 3).reshape(-1)
