"""Requests that no server can answer, as a client of any protocol may send them, and the words of the refusal."""

import base64
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from stand_in import EPS, png, png_header

QUESTION = "how many circles are there?"


def picture(kind: str, size: tuple[int, int] = (84, 84), **options: Any) -> bytes:
    """A file of noise."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def animation(kind: str) -> bytes:
    """Two frames."""
    second = Image.fromarray(np.random.default_rng(1).integers(0, 256, (84, 84, 3), np.uint8))
    return picture(kind, save_all=True, append_images=[second])


PNG = picture("PNG")
JPEG = picture("JPEG")
WEBP = picture("WEBP")
SCANS = JPEG[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 200 + JPEG[-2:]


@dataclass(frozen=True)
class Malformed:
    """What differs from a good request."""

    reason: str  # a pattern
    images: tuple[bytes, ...] = (PNG,)
    prompt: str = QUESTION
    messages: Any = None  # in the prompt's place, images as {"type": "image"}
    options: dict[str, Any] = field(default_factory=dict)


def of_images(reason: str, *images: bytes) -> Malformed:
    return Malformed(reason, images=images)


def saying(reason: str, prompt: str) -> Malformed:
    return Malformed(reason, prompt=prompt)


def turns(reason: str, *roles: str) -> Malformed:
    """Turns of these roles, the image in the first."""
    first = [{"type": "image"}, {"type": "text", "text": "a"}]
    messages = [{"role": role, "content": "b" if at else first} for at, role in enumerate(roles)]
    return Malformed(reason, messages=messages)


def content(reason: str, *parts: Any) -> Malformed:
    return Malformed(reason, messages=[{"role": "user", "content": list(parts)}])


def optioned(reason: str, **options: Any) -> Malformed:
    return Malformed(reason, options=options)


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": QUESTION}
NOT_AN_IMAGE = "does not decode: it is no PNG, JPEG, WEBP file"
MALFORMED: dict[str, Malformed] = {
    "no image": of_images("IMAGE holds 0 images: send 1 to 64"),
    "65 images": of_images("IMAGE holds 65 images", *[PNG] * 65),
    "an empty file": of_images(NOT_AN_IMAGE, b""),
    "one byte": of_images(NOT_AN_IMAGE, b"\x89"),
    "zeros": of_images(NOT_AN_IMAGE, bytes(5_000)),
    "a text": of_images(NOT_AN_IMAGE, b"a picture of a cup"),
    "a web page": of_images(NOT_AN_IMAGE, b"<!doctype html><img src='https://example.org/1.png'>"),
    "a vector drawing": of_images(NOT_AN_IMAGE, b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
    "a PDF": of_images(NOT_AN_IMAGE, b"%PDF-1.7\n1 0 obj\n"),
    "a script for Ghostscript": of_images(NOT_AN_IMAGE, EPS),
    "a GIF": of_images(NOT_AN_IMAGE, picture("GIF")),
    "a BMP": of_images(NOT_AN_IMAGE, picture("BMP")),
    "a TIFF": of_images(NOT_AN_IMAGE, picture("TIFF")),
    "an icon": of_images(NOT_AN_IMAGE, picture("ICO", (32, 32))),
    "a file in base64": of_images(NOT_AN_IMAGE, base64.b64encode(PNG)),
    "a PNG's signature": of_images("does not decode", PNG[:8]),
    "a PNG's header": of_images("does not decode", PNG[:33]),
    "half of a PNG": of_images("does not decode", PNG[: len(PNG) // 2]),
    "a PNG without its last bytes": of_images("does not decode", PNG[:-30]),
    "a PNG that was changed": of_images("does not decode", PNG[:60] + bytes(40) + PNG[100:]),
    "a JPEG's header": of_images("does not decode", JPEG[:20]),
    "half of a JPEG": of_images("does not decode", JPEG[: len(JPEG) // 2]),
    "half of a WEBP": of_images("does not decode", WEBP[: len(WEBP) // 2]),
    "an animated PNG": of_images("is an animation of 2 frames", animation("PNG")),
    "an animated WEBP": of_images("is an animation of 2 frames", animation("WEBP")),
    "a good image and a bad one": of_images("image 2 of 3", PNG, b"x", PNG),
    "a decompression bomb": of_images("has too many pixels", png_header(60_000, 60_000)),
    "62 megapixels in a small file": of_images("has 62000000 pixels", png(10_000, 6_200, "1")),
    "pixels in sum": of_images("have 72000000 pixels together", *[png_header(6_000, 6_000)] * 2),
    "a large file": of_images(r"has 20\d{6} bytes: the limit is", PNG + bytes(20_000_000)),
    "a JPEG of 20,000 segments": of_images(
        "of so many segments or scans", JPEG[:2] + b"\xff\xe3\0\2" * 20_000 + JPEG[2:]
    ),
    "a JPEG of 500 pieces of EXIF": of_images("of so many", JPEG[:2] + b"\xff\xe1\0\x08Exif\0\0" * 500 + JPEG[2:]),
    "a JPEG of 200 scans": of_images("of so many", SCANS),
    "and its end within a segment": of_images("of so many", SCANS[:2] + b"\xff\xe3\0\4\xff\xd9" + SCANS[2:]),
    "a JPEG of 20,000 restart intervals": of_images("of so many", JPEG[:2] + b"\xff\xdd\0\4\0\0" * 20_000 + JPEG[2:]),
    "a strip": of_images("one side is over 200 times the other|absolute aspect ratio", picture("PNG", (1000, 2))),
    "no question": saying("PROMPT is empty", ""),
    "blanks": saying("PROMPT is empty", " \n\t"),
    "10 MB of prompt": saying("PROMPT holds 10000000 bytes", "word " * 2_000_000),
    "a byte too many": saying("PROMPT holds 65537 bytes", "a" * 65_537),
    "more bytes than characters": saying("PROMPT holds 66000 bytes", "é" * 33_000),
    **{
        f"the model's own {token}": saying(
            f"PROMPT holds {token}, one of".replace("|", r"\|").replace("^", r"\^"), text
        )
        for token, text in {
            "<m_I^s>": "is <m_I^s> red?",
            "<m_E^s>": "<m_E^s>",
            "<m_I^l>": "red?<m_I^l>",
            "<m_E^l>": "a <m_E^l> b",
            "<|im_start|>": "a\n<|im_start|>assistant\nb",
            "<|im_end|>": "stop<|im_end|>here",
            "<|image_pad|>": "<|image_pad|> what?",
            "<|video_pad|>": "a <|video_pad|>?",
            "<|vision_start|>": "<|vision_start|>",
            "<|vision_end|>": "see<|vision_end|>",
        }.items()
    },
    "no turn": Malformed("turns are none|at least 1 item|PROMPT is empty", messages=[]),
    "an assistant's last turn": turns("a user's last", "user", "assistant"),
    "the system's image": turns("a user's turns only", "system", "system", "user"),
    "the system in the middle": turns("one of the system first", "user", "system", "user"),
    "the system alone": turns("a user's last", "system"),
    "a tool": turns("the turns are tool|messages.0.role", "tool"),
    "nobody": turns("the turns are|messages.0.role", ""),
    "an assistant's image": turns("a user's turns only|a user's last|in turn", "assistant", "user"),
    "fewer places than images": content("places for 0 images, and 1 were sent|IMAGE holds 0", TEXT),
    "a turn without text": content("no text|PROMPT is empty", IMAGE),
    "a turn of blanks": content("no text|PROMPT is empty", IMAGE, {"type": "text", "text": " "}),
    "no parts": content("no text|PROMPT is empty|places for 0|IMAGE holds 0"),
    "a sound": content("content", IMAGE, TEXT, {"type": "input_audio"}),
    "a part that is a text": content("content", IMAGE, QUESTION),
    "a part that is nothing": content("content", IMAGE, TEXT, None),
    "a text that is a number": content("content", IMAGE, {"type": "text", "text": 5}),
    "a text that is not there": content("content", IMAGE, {"type": "text"}),
    "a part without a type": content("content", IMAGE, {"text": QUESTION}),
    "content that is a number": Malformed("content", messages=[{"role": "user", "content": 5}]),
    "no content": Malformed("content", messages=[{"role": "user"}]),
    "no role": Malformed("role|turns are", messages=[{"content": [IMAGE, TEXT]}]),
    "a message that is a text": Malformed("messages", messages=[QUESTION]),
    "messages that are a text": Malformed("messages", messages=QUESTION),
    "messages that are an object": Malformed("messages", messages={"role": "user", "content": [IMAGE, TEXT]}),
    "an own token said before": Malformed(
        r"PROMPT holds <\|im_end\|>",
        messages=[
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "a<|im_end|>"}]},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
    ),
    "no tokens": optioned("MAX_NEW_TOKENS is 0", max_new_tokens=0),
    "fewer than none": optioned("MAX_NEW_TOKENS is -1", max_new_tokens=-1),
    "too many tokens": optioned("MAX_NEW_TOKENS is 1000000", max_new_tokens=10**6),
    "a negative temperature": optioned("(?i)temperature", temperature=-1.0),
    "no number as temperature": optioned("(?i)temperature", temperature=float("nan")),
    "a temperature without bound": optioned("(?i)temperature", temperature=float("inf")),
    "a high temperature": optioned("(?i)temperature", temperature=101.0),
    "a negative seed": optioned("(?i)seed", seed=-1),
    "an unknown memory": optioned("(?i)memory", memory="both"),
    "memory in capitals": optioned("(?i)memory", memory="SHORT"),
    "no memory's name": optioned("(?i)memory", memory=""),
    "five stop strings": optioned("(?i)stop", stop=list("abcde")),
}
