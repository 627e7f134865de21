"""What identifies data: the hash of an image's pixels, of a sample, and of a whole data set.

Pixels rather than files are hashed, so that the same picture saved twice still counts as one when splits are compared.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from vismem.data.sample import Sample
from vismem.runtime.images import look_of, pixels_sha256, upright
from vismem.runtime.limits import FORMATS, MAX_TOTAL_PIXELS, Room, frames_of, open_file

SPLITS = ("test", "validation", "train")  # in order of precedence: the test split stays whole
FIELDS = ("id", "images", "question", "answer", "choices", "rationale", "task", "capability", "source", "scene")
DECODED = Room(2 * MAX_TOTAL_PIXELS)  # pixels that threads look at together: 1.4 GB of RGB, of 16 bits more
LOCKS = 4096  # of images that threads ask about, by their hashes


@dataclass(frozen=True)
class ImageFacts:
    """What one encoded image turned out to be. `fault` says why it could not be read; None where it could."""

    sha256: bytes  # 32 bytes: of the RGB pixels; of the file where it does not decode
    width: int = 0  # pixels; 0 where not even the header could be read
    height: int = 0
    fault: str | None = None
    contrast: int = 0  # the widest range of values of one colour, 0 to 255: 0 for an image of one colour
    look: bytes = b""  # see `look_of`; empty where it is not decoded


def examine_image(data: bytes, max_side: int | None = None) -> ImageFacts:
    """Decode an encoded image and return its facts; never raises on bad bytes.

    An image with a side above `max_side` is not decoded (it may be a bomb): its facts are the header's.
    """
    width = height = 0
    try:
        with open_file(data)[0] as image:
            width, height = image.size
            if max_side is not None and max(width, height) > max_side:
                return ImageFacts(hashlib.sha256(data).digest(), width, height)
            fault = None
            if (frames := frames_of(image)) > 1:
                fault = f"an animation of {frames} frames, of which a model sees one"
            elif image.format not in (*FORMATS, "MPO"):
                fault = f"a {image.format} file: save it as one of {', '.join(FORMATS)}, which a server reads too"
            if fault:
                return ImageFacts(hashlib.sha256(data).digest(), width, height, fault)
            with DECODED.of(width * height):
                seen = upright(image)
                contrast = int(np.ptp(seen.getextrema(), axis=1).max())
                return ImageFacts(pixels_sha256(seen), *seen.size, None, contrast, look_of(seen))
    except Exception as error:  # noqa: BLE001 - a hostile file can raise anything in a decoder: the row is at fault
        fault = str(error).split("<")[0].strip() or type(error).__name__
        return ImageFacts(hashlib.sha256(data).digest(), width, height, fault if data else "no bytes")


def image_cache(max_side: int | None = None) -> Callable[[bytes], ImageFacts]:
    """`examine_image` that remembers the facts (not the pixels) of images seen before: many questions share one.

    Several threads may ask it; one that is asked about by two of them is decoded once.
    """
    seen, locks = dict[bytes, ImageFacts](), [Lock() for _ in range(LOCKS)]

    def examine(data: bytes) -> ImageFacts:
        key = hashlib.sha256(data).digest()
        with locks[int.from_bytes(key[:2]) % LOCKS]:
            if key not in seen:
                seen[key] = examine_image(data, max_side)
        return seen[key]

    return examine


def seen_sha256(images: Sequence[ImageFacts], videos: Sequence[Sequence[ImageFacts]]) -> list[bytes]:
    """By what a sample's pictures are known in other splits: an image by its pixels, a video by all of its frames'.

    (Not by any one frame: many videos begin with a black one.) What does not decode is left out.
    """
    whole = [frames for frames in videos if frames and all(facts.fault is None for facts in frames)]
    hashes = [facts.sha256 for facts in images if facts.fault is None]
    return hashes + [hashlib.sha256(b"".join(facts.sha256 for facts in frames)).digest() for frames in whole]


def sample_pictures(sample: Sample, examine: Callable[[bytes], ImageFacts]) -> list[bytes]:
    """`seen_sha256` of a sample's images and videos."""
    videos = [[examine(data) for data in video.frames] for video in sample.videos]
    return seen_sha256([examine(data) for data in sample.images], videos)


def sample_sha256(row: Mapping[str, Any]) -> bytes:
    """32 bytes that identify a sample, given as a row; images and frames enter as their files' hashes."""
    plain = {name: row[name] for name in FIELDS}
    plain["images"] = _file_hashes(plain["images"])
    plain["choices"] = list(plain["choices"] or ())
    videos = [{"frames": _file_hashes(video["frames"]), "fps": video["fps"]} for video in row["videos"] or ()]
    if videos:  # a sample without keeps the hash that it had before samples could have any, or a cluster
        plain["videos"] = videos
    if part := row.get("part"):
        plain["part"] = part
    if row.get("cluster"):  # shards of earlier versions have no such column
        plain["cluster"] = row["cluster"]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode("utf-8", "surrogatepass")).digest()


def _file_hashes(files: Iterable[bytes | None] | None) -> list[str]:
    return [hashlib.sha256(data or b"").hexdigest() for data in files or ()]


def data_sha256(splits: Mapping[str, Iterable[bytes]]) -> str:
    """Hex hash of a data set from its samples' hashes, split by split, in order."""
    whole = hashlib.sha256()
    for split in SPLITS:
        inner = hashlib.sha256()
        for digest in splits.get(split, ()):
            inner.update(digest)
        whole.update(split.encode() + inner.digest())
    return whole.hexdigest()
