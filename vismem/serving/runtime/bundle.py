"""Opens an exported bundle: checks every file's hash, starts the ONNX sessions, maps the embedding table."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .errors import BundleError

FORMAT = 1
Array = NDArray[Any]


class Graph:
    """One ONNX graph; called with numpy arrays by name, it returns its outputs by name."""

    def __init__(self, file: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, **values: Array) -> dict[str, Array]:
        """Run the graph. Raises KeyError for a missing input."""
        found = self.session.run(None, {name: values[name] for name in self.inputs})
        return dict(zip(self.outputs, found, strict=True))


class Bundle:
    """The opened bundle. `vision`, `short`, `builder` and `decoder` are its graphs, `settings` is runtime.json."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Raises BundleError if `folder` is no bundle, of another format, or a file is missing or damaged."""
        onnx = folder / "onnx"
        self.settings: dict[str, Any] = _read_settings(onnx / "runtime.json")
        _check_hashes(onnx, self.settings["sha256"])
        self.vision, self.short, self.builder, self.decoder = (
            Graph(onnx / f"{name}.onnx", threads) for name in ("vision", "short", "builder", "decoder")
        )
        weights = onnx / self.settings["weights"]
        self.embedding, self.memory_rows = (
            np.memmap(weights, np.float32, "r", place["offset"], tuple(place["shape"]))
            for place in (self.settings["tensors"][name] for name in ("embedding", "memory_rows"))
        )
        tokenizer = folder / "processor" / "tokenizer.json"
        if not tokenizer.is_file():
            raise BundleError(f"{tokenizer} is missing: export the bundle again")
        self.tokenizer = Tokenizer.from_file(str(tokenizer))


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        raise BundleError(f"{file.parent.parent} is no exported bundle: {file} is missing") from None
    except ValueError as error:
        raise BundleError(f"{file} is damaged ({error}): export the bundle again, or fetch it anew") from None
    if settings.get("format") != FORMAT:
        raise BundleError(f"{file} has format {settings.get('format')}, this runtime reads {FORMAT}: export again")
    return settings


def _check_hashes(folder: Path, expected: Mapping[str, str]) -> None:
    """onnxruntime loads a damaged weight file without a word, so every file is hashed first."""
    for name, value in expected.items():
        file = folder / name
        if not file.is_file():
            raise BundleError(f"{file} is missing: export the bundle again, or fetch it anew")
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != value:
            raise BundleError(f"{file} is damaged: its sha256 is {found[:12]}..., not {value[:12]}...; fetch it anew")
