"""A question and its images, made ready for a bundle's graphs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vismem.runtime.bundle import Bundle
from vismem.runtime.chat import Chat
from vismem.runtime.images import coarse_grid, cut_patches, decoded, grid_of, hash_of, resized
from vismem.runtime.limits import check_patches, check_positions, check_tokens
from vismem.runtime.prompt import Prompt, tokenise

Floats = NDArray[np.float32]


@dataclass(eq=False)
class Question:
    """A question that is ready for its prefill, and what is read of it once."""

    prompt: Prompt
    shown: dict[str, NDArray[Any]]  # patches of the images in the prompt, as `cut_patches` gives them
    whole: dict[str, NDArray[Any]]  # and of the whole images
    seen: bytes  # the images' hash
    id: str = ""  # random numbers are drawn by it
    embeddings: Floats | None = None  # (L, d) of the prompt
    read: dict[str, Floats] = field(default_factory=dict)  # what the decoder makes of them
    stream: dict[str, NDArray[Any]] = field(default_factory=dict)  # the whole images inside the short former


def prepare(
    bundle: Bundle, images: Sequence[Image.Image], chat: Chat, room: int, max_patches: int | None = None
) -> Question:
    """Decode, resize and cut the images, and tokenise the prompt; no graph runs.

    `room`: positions that the answer may take. `max_patches`: of the images after resizing, whole and coarse ones
    together, and tokens of the prompt; None: no limit. RequestError for an unusable request.
    """
    seen, settings = bundle.settings["image"], bundle.settings
    grids = shown = [grid_of(image.size, seen, f"image {i + 1}") for i, image in enumerate(images)]
    if (pixels := seen["prompt_pixels"]) is not None:
        shown = [coarse_grid(grid, pixels, seen["patch_size"], seen["merge_size"]) for grid in grids]
    patches = sum(rows * columns for rows, columns in (grids if shown == grids else [*grids, *shown]))
    check_patches(patches, max_patches)
    prompt = tokenise(bundle.tokenizer, settings, chat, shown)
    check_tokens(len(prompt.ids), max_patches)
    check_positions(int(prompt.positions.max()) + 1 + room, settings["decoder"]["max_positions"])
    pictures = decoded(images)
    if any(picture.size != image.size for picture, image in zip(pictures, images, strict=True)):  # turned by EXIF data
        return prepare(bundle, pictures, chat, room, max_patches)
    hashed = hash_of(pictures)
    if seen["do_resize"]:
        pictures = resized(pictures, grids, seen)
    whole = cut_patches(pictures, grids, seen)
    coarse = whole if shown == grids else cut_patches(resized(pictures, shown, seen), shown, seen)
    return Question(prompt, coarse, whole, hashed)
