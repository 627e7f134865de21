"""Triton's side of a served VisMem model: requests become `Runtime.generate` calls, chunks become responses.

`vismem/export/triton.py` copies this file beside the bundle and the runtime package. It holds no logic of the model.
"""

import io
import json
import locale
import shutil
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

sys.dont_write_bytecode = True  # the repository stays as it was written
locale.setlocale(locale.LC_CTYPE, "C.UTF-8")  # Triton's stub ignores the environment's: files would be read as ASCII

MAX_IMAGES = 64
MAX_PIXELS = 64_000_000  # an image larger than this is refused before it is decoded
MAX_TOKENS = 8192


class RequestError(ValueError):
    """The request cannot be answered; the message goes to the client."""


class TritonPythonModel:
    """One loaded version. Requests beyond `workers` wait in Triton's queue, where they can time out or be cancelled."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the runtime and the bundle that lie in this version's folder."""
        folder = Path(args["model_repository"]) / args["model_version"]
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # this file's own, written before its first line ran
        sys.path.insert(0, str(folder))
        from vismem.serving.runtime import Runtime

        parameters = json.loads(args["model_config"]).get("parameters", {})
        workers = int(parameters.get("workers", {}).get("string_value", "1"))
        self.runtime = Runtime(folder / "bundle", threads=int(parameters.get("threads", {}).get("string_value", "1")))
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="answer")
        self.free = threading.BoundedSemaphore(workers)
        self.stopping = False

    def execute(self, requests: list[Any]) -> None:
        """Hand each request to a free worker, waiting for one; responses go out through the request's sender."""
        for request in requests:
            self.free.acquire()
            self.pool.submit(self._answer, request, request.get_response_sender())

    def finalize(self) -> None:
        """Stop the running answers at their next token."""
        self.stopping = True
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, request: Any, sender: Any) -> None:
        """Answer one request; a fault becomes an error response and ends this request only."""
        try:
            for response in self._responses(request, sender):
                sender.send(response)
        except ValueError as error:  # RequestError, or an input that the runtime refuses
            self._fail(sender, str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:  # noqa: BLE001 - the server's boundary: the reason is logged, other requests live on
            pb_utils.Logger.log_error(traceback.format_exc())
            self._fail(sender, f"the model failed: {type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
        finally:
            try:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            finally:
                self.free.release()

    def _responses(self, request: Any, sender: Any) -> Iterator[Any]:
        """One response a chunk, or a single one with all chunks where the input STREAM is false."""
        images, prompt, options, stream = read_request(request)
        collected = []
        chunks = self.runtime.generate(images, prompt, **options)
        for chunk in chunks:
            if self.stopping or sender.is_cancelled():
                chunks.close()
                return
            if stream:
                yield response_of([chunk])
            else:
                collected.append(chunk)
        if not stream:
            yield response_of(collected)

    @staticmethod
    def _fail(sender: Any, message: str, code: Any) -> None:
        sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)))


def read_request(request: Any) -> tuple[list[Image.Image], str, dict[str, Any], bool]:
    """(images, prompt, options of `generate`, stream or collect) of a request. RequestError says what is wrong."""
    values: dict[str, Any] = {}
    for name in ("IMAGE", "PROMPT", "MAX_NEW_TOKENS", "TEMPERATURE", "SEED", "MEMORY", "STREAM"):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            values[name] = tensor.as_numpy().reshape(-1)
    for name, value in values.items():
        if name != "IMAGE" and len(value) != 1:
            raise RequestError(f"{name} must hold one value, not {len(value)}")
    encoded = values["IMAGE"]
    if not 1 <= len(encoded) <= MAX_IMAGES:
        raise RequestError(f"IMAGE holds {len(encoded)} images: send 1 to {MAX_IMAGES} encoded files")
    try:
        prompt = bytes(values["PROMPT"][0]).decode()
    except UnicodeDecodeError:
        raise RequestError("PROMPT is not UTF-8 text") from None
    if not prompt.strip():
        raise RequestError("PROMPT is empty: ask a question about the image")
    options = {
        "max_new_tokens": int(values.get("MAX_NEW_TOKENS", [48])[0]),
        "temperature": float(values.get("TEMPERATURE", [0.0])[0]),
        "seed": int(values.get("SEED", [0])[0]),
        "memory": bool(values.get("MEMORY", [True])[0]),
    }
    if not 1 <= options["max_new_tokens"] <= MAX_TOKENS:
        raise RequestError(f"MAX_NEW_TOKENS is {options['max_new_tokens']}: it must lie in 1..{MAX_TOKENS}")
    if not 0 <= options["temperature"] <= 100:  # refuses NaN too
        raise RequestError(f"TEMPERATURE is {options['temperature']}: it must lie in 0..100 (0 is greedy)")
    if options["seed"] < 0:
        raise RequestError(f"SEED is {options['seed']}: it must not be negative")
    images = [decode_image(bytes(data), f"image {i + 1} of {len(encoded)}") for i, data in enumerate(encoded)]
    return images, prompt, options, bool(values.get("STREAM", [True])[0])


def decode_image(data: bytes, which: str) -> Image.Image:
    """The decoded picture. RequestError if the bytes are no complete image file, or one of too many pixels."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise RequestError(f"{which} has {image.width}x{image.height} pixels: more than {MAX_PIXELS}")
        image.load()
        return image
    except RequestError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise RequestError(f"{which} ({len(data)} bytes) does not decode: {reason}; send a PNG or JPEG file") from None


def response_of(chunks: list[Any]) -> Any:
    """A response with the outputs TEXT and EVENT, one entry a chunk."""
    text = np.array([chunk.text.encode() for chunk in chunks], dtype=object)
    event = np.array([chunk.event.encode() for chunk in chunks], dtype=object)
    return pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", text), pb_utils.Tensor("EVENT", event)])
