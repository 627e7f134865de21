"""Answers questions from an exported bundle, with numpy, onnxruntime, tokenizers and Pillow; never imports torch.

The package imports nothing else of VisMem: it is copied into the Triton model repository as it stands.
"""

from .errors import BundleError, RequestError
from .runtime import Chunk, Runtime

__all__ = ["BundleError", "Chunk", "RequestError", "Runtime"]
