"""Images for the exported model."""

import io

import numpy as np
from PIL import Image

TOKENS = 16


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
