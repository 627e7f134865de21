"""Images to patches, with numpy and Pillow only: bit for bit what transformers' Qwen2VLImageProcessorPil gives.

Also the place of each patch: its row and column for the rotary position, its image and its attention window.
"""

import binascii
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from vismem.runtime.limits import FORMATS, RequestError

Grid = tuple[int, int]  # rows and columns of patches
LOOK = 8  # sides of the small copy by which two images are seen to be alike
DATA_URI = "data:"
URL = re.compile(r"\w+://?\w")
PIECE = 1 << 18  # characters of base64 that are decoded at a time
TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def url_fault(image: str) -> str:
    """What is wrong where a URL stands for an image's path; nothing for a path."""
    return f"{image} is a URL: download it first and give the file" if URL.match(image) else ""


def decoded_base64(text: str) -> bytes:
    """Bytes from base64, wrapped in lines or not, or from a data URI of it. ValueError where it is neither."""
    if text.startswith(DATA_URI):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(
                f"a data URI of base64 begins with data:image/png;base64, or the like, not with {head[:40]}"
            )
    data = text.strip().encode("ascii")
    return from_base64(data.translate(None, b"\r\n") if b"\n" in data or b"\r" in data else data)


def from_base64(data: bytes) -> bytes:
    """Bytes from strict base64, decoded in pieces: a server's other threads run in between. ValueError for others."""
    pieces = list[bytes]()
    for start in range(0, len(data), PIECE):
        if start and len(pieces[-1]) < PIECE // 4 * 3:
            raise binascii.Error("Excess data after padding")
        pieces.append(binascii.a2b_base64(data[start : start + PIECE], strict_mode=True))
    return b"".join(pieces)


def image_file(data: bytes) -> bytes:
    """An encoded image, sent as it is or, since JSON holds no bytes, as base64."""
    try:
        return from_base64(data)
    except ValueError:  # no image file consists of base64's characters
        return data


def upright(image: Image.Image) -> Image.Image:
    """The image as every model sees it, in training and behind a server: decoded, 8 bits a channel, RGB.

    It is turned as its EXIF data says, and stands on white where it is transparent. Whatever Pillow raises for one that
    does not decode.
    """
    if (turn := TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))) is not None:
        image = image.transpose(turn)  # by ImageOps, odd data in other tags would be an error
        image.info.pop("exif", None)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def pixels_sha256(seen: Image.Image) -> bytes:
    """32 bytes by which an image that is `upright` is known: the same for the same picture saved twice."""
    whole = hashlib.sha256(b"%dx%d:" % seen.size)
    whole.update(seen.tobytes())
    return whole.digest()


def hash_of(seen: Sequence[Image.Image]) -> bytes:
    """32 bytes by which such images are known together, in their order."""
    return hashlib.sha256(b"".join(map(pixels_sha256, seen))).digest()


def look_of(seen: Image.Image) -> bytes:
    """LOOK x LOOK RGB means of an image that is `upright`, which JPEG and resizing hardly change."""
    return seen.resize((LOOK, LOOK), Image.Resampling.BILINEAR).tobytes()


def decoded(images: Sequence[Image.Image]) -> list[Image.Image]:
    """The images as `upright` gives them. Raises RequestError for one that does not decode."""
    found = []
    for number, image in enumerate(images):
        try:
            found.append(upright(image))
        except Exception as error:  # noqa: BLE001 - a hostile file can raise anything in a decoder
            name = f"image {number + 1} of {len(images)}"
            raise RequestError(f"{name} does not decode: {error}; send the complete file") from None
    return found


def let_go(images: Sequence[Image.Image], pixels: bool) -> None:
    """Free what images that were read from files hold: a WebP's decoder, two frames, and the `pixels`."""
    for image in images:
        vars(image).pop("_decoder", None)
        if pixels and isinstance(image, ImageFile.ImageFile):
            image.close()


def unread(image: Image.Image) -> Image.Image:
    """The image as it was opened, to be decoded again; one that is from no file in memory is itself."""
    if isinstance(image, ImageFile.ImageFile) and isinstance(image.fp, io.BytesIO):
        return Image.open(io.BytesIO(image.fp.getvalue()), formats=FORMATS)
    return image


def resized(images: Sequence[Image.Image], grids: Sequence[Grid], settings: Mapping[str, Any]) -> list[Image.Image]:
    """The decoded images as large as their grids of patches; one that already is stays as it is."""
    sizes = [(columns * settings["patch_size"], rows * settings["patch_size"]) for rows, columns in grids]
    return [
        image if image.size == size else image.resize(size, resample=settings["resample"])
        for image, size in zip(images, sizes, strict=True)
    ]


def cut_patches(
    images: Sequence[Image.Image], grids: Sequence[Grid], settings: Mapping[str, Any]
) -> dict[str, NDArray[Any]]:
    """Normalise and cut at least one image. `settings` is the "image" section of runtime.json.

    `images` are as large as their `grids`: see `resized`. Returns the inputs of the vision graph, image after image,
    the merger's 2x2 blocks together: `pixels` (P, channels * temporal * patch * patch), `positions` (P, 2) row and
    column within the image, `windows` (P,) unique over all images, `images` (P,).
    """
    parts, windows = [], 0
    for number, (image, grid) in enumerate(zip(images, grids, strict=True)):
        positions, own_windows = _places(grid, settings)
        parts.append(
            (_flat_patches(image, settings), positions, own_windows + windows, np.full(len(positions), number))
        )
        windows += int(own_windows.max()) + 1
    joined = (np.concatenate(part) for part in zip(*parts, strict=True))
    return dict(zip(("pixels", "positions", "windows", "images"), joined, strict=True))


def grid_of(size: tuple[int, int], settings: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Patches (rows, columns) of an image of `size` (width, height) in pixels, which need not be decoded yet.

    The resized image keeps the aspect ratio and has `min_pixels` to `max_pixels` pixels. Raises RequestError, which
    calls the image `name`, if one side is more than 200 times the other.
    """
    width, height = size
    patch, merge, low, high = (settings[key] for key in ("patch_size", "merge_size", "min_pixels", "max_pixels"))
    if not settings["do_resize"]:
        return height // patch, width // patch
    if max(size) > 200 * min(size):
        raise RequestError(f"{name} is {width}x{height}: one side is over 200 times the other; crop it")
    block = patch * merge  # pixels along the side of what the merger makes one token
    rows, columns = round(height / block), round(width / block)
    if rows * columns * block**2 > high:
        shrink = math.sqrt(height * width / high)
        rows, columns = (max(1, math.floor(side / shrink / block)) for side in (height, width))
    elif rows * columns * block**2 < low:
        grow = math.sqrt(low / (height * width))
        rows, columns = (math.ceil(side * grow / block) for side in (height, width))
    return rows * merge, columns * merge


def coarse_grid(grid: Grid, pixels: int, patch: int, merge: int) -> Grid:
    """The grid of an image of `grid` patches once it is shrunk to at most `pixels`; where it has no more, its own.

    The rule is the processor's own (see `grid_of`); no side becomes less than one merged patch. `patch`: pixels along
    a patch's side; `merge`: patches along the side of what is merged.
    """
    height, width = (side * patch for side in grid)
    if height * width <= pixels:
        return grid
    shrink, block = math.sqrt(height * width / pixels), patch * merge
    rows, columns = (max(1, math.floor(side / shrink / block)) * merge for side in (height, width))
    return rows, columns


def size_after_resizing(size: tuple[int, int], processor: Any, name: str = "an image") -> tuple[int, int]:
    """Width and height in pixels that a Qwen2.5-VL's image processor gives an image of `size`; see `grid_of`."""
    settings = {name: getattr(processor, name) for name in ("do_resize", "patch_size", "merge_size")}
    settings |= {"min_pixels": processor.size["shortest_edge"], "max_pixels": processor.size["longest_edge"]}
    rows, columns = grid_of(size, settings, name)
    return columns * processor.patch_size, rows * processor.patch_size


def _flat_patches(image: Image.Image, settings: Mapping[str, Any]) -> NDArray[np.float32]:
    """(P, channels * temporal * patch * patch), by a table of what each level of 8 bits becomes in each channel."""
    patch, merge, values = settings["patch_size"], settings["merge_size"], np.asarray(image)
    height, width, channels = values.shape
    blocks = values.reshape(height // patch // merge, merge, patch, width // patch // merge, merge, patch, channels)
    levels = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, 1, patch**2)
    made: NDArray[np.float32] = _table(settings, channels)[levels + 256 * np.arange(channels)[:, None, None]]
    return made.repeat(settings["temporal_patch_size"], axis=2).reshape(len(made), -1)


def _table(settings: Mapping[str, Any], channels: int) -> NDArray[np.float32]:
    """(channels * 256,) the levels, rescaled in double precision and normalised in single."""
    levels = np.arange(256, dtype=np.float64)
    if settings["do_rescale"]:
        levels *= settings["rescale_factor"]
    table = np.tile(levels.astype(np.float32), (channels, 1))
    if settings["do_normalize"]:
        table -= np.array(settings["mean"], np.float32)[:, None]
        table /= np.array(settings["std"], np.float32)[:, None]
    return table.ravel()


def _places(grid: tuple[int, int], settings: Mapping[str, Any]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Row and column (P, 2) and window number (P,) of each patch of one image."""
    (rows, columns), merge = grid, settings["merge_size"]
    side = settings["window_size"] // merge // settings["patch_size"] * merge  # patches along a window's side
    cells = np.indices(grid).reshape(2, rows // merge, merge, columns // merge, merge)
    positions = cells.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    row, column = (positions // side).T
    return positions.astype(np.float32), row * -(-columns // side) + column
