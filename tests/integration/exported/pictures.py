"""Images for the exported model, and its answers by either executor."""

import io

import numpy as np
from PIL import Image

from vismem.export.parity import decode, prepared
from vismem.generation.onnx_executor import OnnxExecutor
from vismem.generation.torch_executor import TorchExecutor

TOKENS = 16


def by_torch(model, sample, forced=None):
    return decode(TorchExecutor(model), sample, forced or {}, TOKENS)


def by_graphs(bundle, sample, forced=None):
    executor = OnnxExecutor(bundle)
    return decode(executor, prepared(executor, sample, TOKENS), forced or {}, TOKENS)


def pictures(sample):
    return [Image.open(io.BytesIO(data)) for data in sample.images]


def noise(width, height, seed=0, mode="RGB"):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def encoded(*images):
    files = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    return tuple(files)
