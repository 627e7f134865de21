"""Opens an exported bundle: starts the ONNX sessions, maps the embedding table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vismem.runtime.limits import NEW_TOKENS

FORMAT = 5
Array = NDArray[Any]


class BundleError(Exception):
    """The bundle has no graphs, or graphs of another release: what, where, and what to do."""


class Graph:
    """One ONNX graph; called with numpy arrays by name, it returns its outputs by name."""

    def __init__(self, file: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
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
        """Open files that the caller has verified or written: onnxruntime loads a damaged weight file without an error.

        Raises BundleError for a folder without graphs, and for another format.
        """
        self.folder, onnx = folder, folder / "onnx"
        if not (onnx / "runtime.json").is_file():
            raise BundleError(
                f"{folder} has no ONNX graphs: serve it by `vismem api`, or export again with export.graphs true"
            )
        self.settings: dict[str, Any] = json.loads((onnx / "runtime.json").read_text())
        if (found := self.settings.get("format")) != FORMAT:
            raise BundleError(f"{onnx}/runtime.json has format {found}, this runtime reads {FORMAT}: export again")
        self.new_tokens = int(self.settings.get("new_tokens", NEW_TOKENS))  # bundles of earlier versions do not say
        self.vision, self.short, self.builder, self.decoder = (
            Graph(onnx / f"{name}.onnx", threads) for name in ("vision", "short", "builder", "decoder")
        )
        weights = onnx / self.settings["weights"]
        self.embedding, self.memory_rows = (
            np.asarray(np.memmap(weights, np.float32, "r", place["offset"], tuple(place["shape"])))
            for place in (self.settings["tensors"][name] for name in ("embedding", "memory_rows"))
        )
        self.tokenizer = Tokenizer.from_file(str(folder / "processor" / "tokenizer.json"))
