"""Where the memories of some answers looked, for the report: VisMem answers these questions once more, untimed."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageColor

from vismem.config import Config
from vismem.data.sample import Sample
from vismem.evaluation.arms import ARMS
from vismem.evaluation.plots import KIND_COLOURS
from vismem.generation.loop import DecodeLoop, Request
from vismem.generation.torch_executor import TorchExecutor
from vismem.generation.types import Rollout
from vismem.models.attention import Look, Map
from vismem.models.kinds import MemoryKind
from vismem.models.vismem import VisMemModel
from vismem.pages import data_uri
from vismem.records import VISMEM

LEVELS, DARKEST, VEIL = 16, 0.85, 0.55  # of a map; alpha of the cell most looked at; alpha of the white below all


@torch.inference_mode()
def find_looks(
    model: VisMemModel, samples: Mapping[int, Sample], answered: Sequence[Rollout], config: Config
) -> dict[int, list[Look]]:
    """The looks of each answer's memories, in their order; `samples` by their place in `answered`.

    An answer that now has other memories is left out: on a bfloat16 base other batches may change it.
    """
    found, places, settings = dict[int, list[Look]](), list(samples), config.evaluate
    for start in range(0, len(places), settings.batch_size):
        loop, rows = DecodeLoop(TorchExecutor(model)), {}
        for place in places[start : start + settings.batch_size]:
            found[place] = []
            asked, policy, most = [samples[place]], ARMS[VISMEM].policy, settings.max_new_tokens
            (rows[place],) = loop.join(Request(asked, policy, most, seed=config.seed, looks=found[place]))
        while loop.step():
            pass
        for place, row in rows.items():
            if tuple(row.invocations) != answered[place].invocations:
                del found[place]
    return found


def map_picture(weights: Map, kind: MemoryKind) -> str:
    """A data URI of the map, a pixel for each cell, to lay over the picture: a white veil, coloured where it looked."""
    cells = np.array(weights)
    levels = np.rint((LEVELS - 1) * cells / max(cells.max(), 1e-12)).astype(np.uint8)
    colour = DARKEST * np.arange(LEVELS)[:, None] / (LEVELS - 1)
    alpha = colour + VEIL * (1 - colour)
    shade = (colour * ImageColor.getrgb(KIND_COLOURS[kind]) + (alpha - colour) * 255) / alpha
    image = Image.fromarray(levels, "P")
    image.putpalette(np.rint(np.hstack([shade, 255 * alpha])).astype(np.uint8).tobytes(), "RGBA")
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return data_uri(file.getvalue(), "PNG")
