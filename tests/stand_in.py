"""A Triton model repository whose runtime is a stand-in: its answers are known, and some prompts make it fail."""

import io
import re
import struct
import time
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vismem.files import write_json
from vismem.provenance import write_manifest
from vismem.serving.client import Client
from vismem.serving.exchange import Token
from vismem.serving.repository import copy_library, write_model_repository
from vismem.serving.server import TritonServer

STAND_IN = """
import json, os, time
from dataclasses import dataclass
from types import SimpleNamespace

from vismem.runtime.limits import check_stops
from vismem.serving.metrics import Metrics

class Busy(Exception):
    pass

@dataclass(frozen=True)
class Chunk:
    text: str
    event: str
    usage: None = None
    token: int | None = None

class Runtime:
    executor = SimpleNamespace(new_tokens=48)

    @classmethod
    def open(cls, bundle, threads, max_patches, rows):
        return cls(bundle)

    def __init__(self, bundle):
        self.word = (bundle / "word.txt").read_text()
        self.left = 0  # answers that were given up half way
        self.asked = 0
        self.metrics = Metrics(lambda: 0, lambda: 0)

    def stream(self, images, prompt, *, every, **options):
        return ([chunk] for chunk in self.generate(images, prompt, **options))

    def generate(
        self, images, prompt, *, max_new_tokens=48, temperature=0.0, seed=0, memory="learned", stop=(), gone=None
    ):
        check_stops(stop)
        if prompt == "echo":
            sizes = [image.size for image in images]
            yield Chunk(json.dumps([sizes, max_new_tokens, temperature, seed, memory, stop]), "end")
            return
        if prompt == "nothing":
            yield Chunk("", "end")
            return
        if prompt == "count":
            self.asked += 1
            yield Chunk(str(self.asked), "end")
            return
        if prompt == "left":
            yield Chunk(str(self.left), "end")
            return
        try:
            for i in range(max_new_tokens):
                while prompt == "silent" and not gone.is_set():
                    time.sleep(0.01)
                if gone is not None and gone.is_set():
                    self.left += 1
                    raise Busy("nobody reads the answer")
                if i == 1 and memory == "learned":
                    yield Chunk("", "short")
                if i == 2 and prompt == "fail":
                    raise RuntimeError("as asked")
                if i == 2 and prompt == "misfit":
                    raise ValueError("as asked")
                if i == 2 and prompt == "die":
                    os._exit(1)
                time.sleep(0.02 if prompt == "endless" else 0)
                self.metrics.tokens.inc()
                yield Chunk(f" {self.word}{i}", "token", token=i)
            yield Chunk("", "end")
        except GeneratorExit:
            self.left += 1
            raise
"""
ANSWER = (Token(" é0", "token"), Token("", "short"), Token(" é1", "token"), Token(" é2", "token"), Token("", "end"))


def png(width: int = 30, height: int = 20, mode: str = "RGB") -> bytes:
    """An image of one colour."""
    file = io.BytesIO()
    Image.new(mode, (width, height), 1).save(file, "PNG")
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds no pixel."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = (header, b"IDAT")
    coded = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(coded)


IMAGE = png()
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\n"
HOSTILE = {  # a request's options, and the reason for which it is refused
    "62 megapixels in a small file": ({"images": [png(10_000, 6_200, "1")]}, "has 62000000 pixels: the limit is"),
    "a decompression bomb": ({"images": [png_header(60_000, 60_000)]}, "has too many pixels: the limit is"),
    "pixels in sum": ({"images": [png_header(6_000, 6_000)] * 2}, "have 72000000 pixels together: the limit is"),
    "65 images": ({"images": [IMAGE] * 65}, "IMAGE holds 65 images: send 1 to 64"),
    "a large file": ({"images": [IMAGE + bytes(20_000_000)]}, r"image 1 of 1 has 20\d{6} bytes: the limit is"),
    "bytes in sum": ({"images": [IMAGE + bytes(19_000_000)] * 4}, r"have 76\d{6} bytes together: the limit is"),
    "EPS": ({"images": [IMAGE, EPS]}, r"image 2 of 2 \(\d+ bytes\) does not decode: it is no PNG, JPEG, WEBP file"),
    "10 MB of prompt": ({"prompt": "word " * 2_000_000}, "PROMPT holds 10000000 bytes: the limit is"),
    "tokens": ({"max_new_tokens": 10**6}, r"MAX_NEW_TOKENS is 1000000: it must lie in 1\.\."),
}


def make_repository(
    folder: Path,
    name: str = "vismem",
    runtime: str = STAND_IN,
    *,
    version: int = 7,
    word: str = "é",
    golden: Sequence[dict[str, Any]] = (),
) -> Path:
    """A repository with the stand-in runtime, moved after it was written, as a step's output is."""
    bundle, library = folder / "bundle", folder / "vismem"
    (bundle / "onnx").mkdir(parents=True)
    copy_library(folder)
    (bundle / "onnx" / "runtime.json").write_text("{}")
    (bundle / "word.txt").write_text(word)
    (bundle / "golden").mkdir()
    (bundle / "golden" / "image").write_bytes(IMAGE)
    write_json(bundle / "golden" / "golden.json", list(golden))
    write_json(bundle / "lineage.json", {"memories_per_answer": {"short": 0.25, "long": 0.0}})
    write_manifest(bundle)
    (library / "serving" / "answering.py").write_text(runtime)
    write_model_repository(bundle, folder / "partial", name, version, library=library)
    return (folder / "partial").rename(folder / "model_repository")


def ask(server: TritonServer, prompt: str = "hi", **options: object) -> tuple[Token, ...]:
    """All pieces of one answer."""
    options = {"images": [IMAGE], "max_new_tokens": 3, "timeout": 20} | options
    client, images, stream = client_of(server), options.pop("images"), options.pop("stream", True)
    return tuple(client.stream(images, prompt, **options)) if stream else client.ask(images, prompt, **options).pieces  # type: ignore[arg-type]


def client_of(server: TritonServer, model: str = "vismem") -> Client:
    return Client(f"grpc://{server.grpc_url}", model=model)


def endless(server: TritonServer) -> Iterator[Token]:
    """An answer of 40 seconds."""
    return client_of(server).stream([IMAGE], "endless", max_new_tokens=2000)


def metrics(server: TritonServer) -> str:
    """What the server reports to Prometheus."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['metrics']}/metrics", timeout=10) as reply:
        text: str = reply.read().decode()
    return text


def decoding(server: TritonServer) -> bool:
    """Whether a token was decoded since the last look."""
    before = re.findall(r"^vismem_tokens_total\{.*\} (\d+)", metrics(server), re.MULTILINE)
    time.sleep(1)
    return before != re.findall(r"^vismem_tokens_total\{.*\} (\d+)", metrics(server), re.MULTILINE)


def pending(server: TritonServer) -> int:
    """How many requests wait in Triton's queue."""
    (count,) = re.findall(
        r"^nv_inference_pending_request_count\{model=\"vismem\".*\} (\d+)", metrics(server), re.MULTILINE
    )
    return int(count)
