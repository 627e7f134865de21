"""What one request may hold. The server and `vismem infer` both check it with `check_request`, before any work."""

import io
import re
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import MAX_TEXT_CHUNK

MAX_IMAGES = 64
MAX_IMAGE_BYTES = 20_000_000  # of one encoded file
MAX_TOTAL_BYTES = 64_000_000  # of all encoded files
MAX_IMAGE_PIXELS = 50_000_000
MAX_TOTAL_PIXELS = 64_000_000
MAX_PROMPT_BYTES = 65_536  # as UTF-8
MAX_STOPS = 4  # texts before which an answer ends
MAX_STOP_BYTES = 256  # of one, as UTF-8: every token is compared with it
MAX_NEW_TOKENS = 2_048
NEW_TOKENS = 120  # the longest answer where a request does not say
MAX_PATCHES = 4_096  # of all images, resized; tokens of a prompt; attention holds their square: 1 GB with four heads
LOOK_SECONDS = 0.2  # between two looks whether who waits is still there
FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow tries no other decoder
# Around the picture in a file, which Pillow reads in Python.
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
MAX_CHUNKS = 10_000  # of a PNG: 20 MB in pieces of 8 KB, as encoders write them, are 2,500
MAX_PARTS = 1_000  # of a PNG, chunks without a piece of the picture; of a JPEG, segments
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")  # texts may take four bytes a character, EXIF time for each tag
MAX_TEXT_BYTES = 4_000_000  # of a request's texts, profiles, inflated, and EXIF data
TOO_MUCH_TEXT = f"texts and EXIF data take more than {MAX_TEXT_BYTES} bytes; save it without them"
# Of a JPEG: Pillow joins its EXIF segments in quadratic time, and each scan of a progressive one goes over all blocks.
MAX_EXIF, MAX_RESOURCES, MAX_SCANS = 16, 1_000, 100
MAX_LOOSE = 16_384  # bytes before the first scan that are in no segment, or in one of tables: each takes Python's time
SEGMENT = re.compile(rb"\xff[\xe0-\xef\xfe]")
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # outside of segments; what a scan's data hold is none of them
SCAN, END = b"\xff\xda", b"\xff\xd9"


class RequestError(ValueError):
    """The request is at fault: why, in which input (as Triton calls it), and what OpenAI calls such a fault."""

    def __init__(self, reason: str, field: str = "", code: str | None = None) -> None:
        super().__init__(f"{field} {reason}".strip())
        self.reason, self.field, self.code = reason, field, code


class Room:
    """So much of something that threads may hold together; one that asks for more than all waits until it is alone.

    They get it in the order in which they ask: else small parts would pass one that waits for a large one for ever.
    """

    def __init__(self, whole: int) -> None:
        self.whole, self.held, self.changed = whole, 0, threading.Condition()
        self.waiting = deque[object]()

    @contextmanager
    def of(self, part: int, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """A block that holds `part` of it. While it waits, what `check` raises ends that."""
        with self.changed:
            self.waiting.append(turn := object())
            try:
                while not self.changed.wait_for(
                    lambda: self.waiting[0] is turn and (self.held == 0 or self.held + part <= self.whole), LOOK_SECONDS
                ):
                    check()
            finally:
                self.waiting.remove(turn)
                self.changed.notify_all()
            self.held += part
        try:
            yield
        finally:
            with self.changed:
                self.held -= part
                self.changed.notify_all()


def check_request(
    files: Sequence[bytes | Image.Image], prompt: bytes, max_new_tokens: int, names: Sequence[str] = ()
) -> list[Image.Image]:
    """Open the encoded images, of which only the headers are read: Pillow decodes an image when it is first used.

    One that is open already, in this process, has no file whose bytes could be too many. `names` are what a message
    calls the images; without, they are numbered.

    Raises RequestError with the first limit that the request exceeds, or for a prompt that is empty or not UTF-8.
    """
    if not 1 <= len(files) <= MAX_IMAGES:
        raise RequestError(f"holds {len(files)} images: send 1 to {MAX_IMAGES} encoded files", "IMAGE")
    if len(prompt) > MAX_PROMPT_BYTES:
        raise RequestError(f"holds {len(prompt)} bytes: the limit is {MAX_PROMPT_BYTES}", "PROMPT")
    try:
        empty = not prompt.decode().strip()
    except UnicodeDecodeError:
        raise RequestError("is not UTF-8 text", "PROMPT") from None
    if empty:
        raise RequestError("is empty: ask a question about the image", "PROMPT")
    if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise RequestError(f"MAX_NEW_TOKENS is {max_new_tokens}: it must lie in 1..{MAX_NEW_TOKENS}")
    names = names or [f"image {number} of {len(files)}" for number in range(1, len(files) + 1)]
    sizes = [len(file) if isinstance(file, bytes) else 0 for file in files]
    _check("bytes", sizes, names, MAX_IMAGE_BYTES, MAX_TOTAL_BYTES)
    images, texts = list[Image.Image](), 0
    for name, file in zip(names, files, strict=True):
        if isinstance(file, Image.Image):
            images.append(file)
            continue
        try:
            image, own = open_file(file, FORMATS)
            images.append(image)
            texts += own
            if texts > MAX_TEXT_BYTES:
                raise ValueError(f"with it {TOO_MUCH_TEXT}")
        except Image.DecompressionBombError:
            raise RequestError(f"{name} has too many pixels: the limit is {MAX_IMAGE_PIXELS}") from None
        except (OSError, SyntaxError, ValueError) as error:
            reason = f"it is no {', '.join(FORMATS)} file" if isinstance(error, UnidentifiedImageError) else error
            raise RequestError(f"{name} ({len(file)} bytes) does not decode: {reason}") from None
        if (frames := frames_of(images[-1])) > 1:
            raise RequestError(f"{name} is an animation of {frames} frames: send one of them")
    _check("pixels", [image.width * image.height for image in images], names, MAX_IMAGE_PIXELS, MAX_TOTAL_PIXELS)
    return images


def open_file(file: bytes, formats: tuple[str, ...] | None = None) -> tuple[Image.Image, int]:
    """The image, of which only the header is read, and the bytes of its texts, EXIF data and colour profile, inflated.

    `formats`: those that Pillow tries; None: all. ValueError for a JPEG or PNG that is made to take minutes, or
    gigabytes, to open or decode, and for an image with too many such bytes; what `Image.open` raises.
    """
    if file.startswith(JPEG) and (file.count(b"8BIM") > MAX_RESOURCES or _too_many_scans(file)):
        raise ValueError("a JPEG of so many segments or scans is no photo; save it again")
    texts = _texts_of(file) if file.startswith(PNG) else 0
    image = Image.open(io.BytesIO(file), formats=formats)
    if image.format != "PNG":
        texts += len(image.info.get("exif", b"")) + len(image.info.get("mp", b""))
    if texts > MAX_TEXT_BYTES:
        raise ValueError(TOO_MUCH_TEXT)
    return image, texts


def _too_many_scans(file: bytes) -> bool:
    """Whether a JPEG's picture has more scans, segments or EXIF data than it may, or begins after too many bytes.

    What stands behind its end is not read: a phone's photo may have a video there, with any bytes. Segments are skipped
    by their lengths, as the decoder does: they may hold the bytes that end a picture.
    """
    at, exif, scans, loose = len(JPEG), 0, 0, 0
    for _ in range(MAX_PARTS):
        marker = MARKER.search(file, at)
        if marker is None or marker[0] == END:
            return not scans and loose + len(file) - at > MAX_LOOSE  # Pillow looks for a scan up to the file's end
        following = marker.end() + max(2, int.from_bytes(file[marker.end() : marker.end() + 2], "big"))
        if not scans:
            loose += (marker.start() if SEGMENT.match(marker[0]) else following) - at
        exif += file.startswith(b"Exif\0\0", marker.end() + 2)
        scans += marker[0] == SCAN
        if exif > MAX_EXIF or scans > MAX_SCANS or loose > MAX_LOOSE:
            return True
        at = following
    return True


def _texts_of(file: bytes) -> int:
    at, parts, others, texts = len(PNG), 0, 0, 0
    while at + 8 <= len(file):
        length, kind = struct.unpack_from(">I4s", file, at)
        if kind == b"IEND":
            break
        parts, others = parts + 1, others + (kind != b"IDAT")
        if parts > MAX_CHUNKS or others > MAX_PARTS:
            raise ValueError("a PNG of so many chunks is no picture; save it again")
        if kind in TEXTS:
            texts += length + _inflated(kind, file[at + 8 : at + 8 + length])
        if texts > MAX_TEXT_BYTES:
            raise ValueError(TOO_MUCH_TEXT)
        at += 12 + length
    return texts


def _inflated(kind: bytes, chunk: bytes) -> int:
    """How many bytes Pillow makes of the packed part of a chunk; of one that is damaged, how many it may make."""
    rest = chunk[chunk.find(b"\0") + 1 :]
    if kind in (b"tEXt", b"eXIf") or (kind == b"iTXt" and rest[:1] == b"\0"):
        return 0
    packed = rest[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else rest[1:]
    try:
        return len(zlib.decompressobj().decompress(packed, MAX_TEXT_CHUNK))
    except zlib.error:
        return min(MAX_TEXT_CHUNK, 1_032 * len(packed))


def check_stops(stops: Sequence[str]) -> None:
    """RequestError for too many texts before which an answer ends, or one that is too long."""
    if len(stops) > MAX_STOPS:
        raise RequestError(f"holds {len(stops)} texts: send at most {MAX_STOPS}", "STOP")
    if (longest := max((len(stop.encode(errors="surrogatepass")) for stop in stops), default=0)) > MAX_STOP_BYTES:
        raise RequestError(f"holds a text of {longest} bytes: the limit is {MAX_STOP_BYTES}", "STOP")


def check_patches(patches: int, most: int | None) -> None:
    """RequestError where images make more patches than `most`; None: no limit."""
    if most is not None and patches > most:
        raise RequestError(f"the images make {patches} patches: the limit is {most}; send fewer or smaller")


def check_tokens(tokens: int, most: int | None) -> None:
    """RequestError where a prompt has more tokens than `most`, those of its images too; None: no limit."""
    if most is not None and tokens > most:
        raise RequestError(f"the question and its images make {tokens} tokens: the limit is {most}; send less")


def check_positions(needed: int, held: int) -> None:
    """RequestError where a prompt and its answer need more positions than the model has."""
    if needed > held:
        raise RequestError(
            f"the question, its images and the answer need {needed} positions, the model has {held}: "
            "send less, or ask for less",
            code="context_length_exceeded",
        )


def frames_of(image: Image.Image) -> int:
    """How many frames an image has: one for a camera's JPEG with more pictures behind the first (MPO)."""
    frames: int = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    return frames


def _check(unit: str, counts: Sequence[int], names: Sequence[str], limit: int, total_limit: int) -> None:
    for name, count in zip(names, counts, strict=True):
        if count > limit:
            raise RequestError(f"{name} has {count} {unit}: the limit is {limit}")
    if sum(counts) > total_limit:
        raise RequestError(f"the images have {sum(counts)} {unit} together: the limit is {total_limit}")
