"""Do the graphs say what torch says? Greedy tokens must be equal, memories within a tolerance."""

import io
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.generation.invocation import InvocationPolicy, Learned, Replay, row_key
from vismem.generation.loop import DecodeLoop, Executor, Request
from vismem.generation.onnx_executor import OnnxExecutor
from vismem.generation.torch_executor import TorchExecutor
from vismem.models.kinds import MemoryKind
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel
from vismem.records import ParityReport
from vismem.runtime.limits import RequestError, check_patches
from vismem.runtime.question import Question

Memories = list[NDArray[np.float32]]
Decoding = tuple[tuple[int, ...], Memories]  # an answer's token ids, LATENT where a memory vector stands; its memories


def check_parity(
    model: VisMemModel, graphs: OnnxExecutor, samples: Sequence[Sample], *, max_new_tokens: int, tolerance: float
) -> ParityReport:
    """Decode every sample by both executors and compare the answers and the memories.

    Once the model invokes as it likes, once both memories are forced at the answer's start, so that formation is
    compared even where the policy never invokes. `max_memory_difference` is the largest absolute difference of any
    number in any memory. A difference is reported, never raised.
    """
    equal = 0
    differences: list[str] = []
    distances: list[float] = []
    seconds = {"torch": 0.0, "runtime": 0.0}
    reference = TorchExecutor(model)
    for place, sample in enumerate(samples):
        known = len(differences)
        # One memory at the answer's start and the other after its first word, the order changing from item to item.
        both = {0: KINDS[place % 2], 2: KINDS[place % 2].other}
        for forced in ({}, both):
            start = time.perf_counter()
            expected, memories = decode(reference, sample, forced, max_new_tokens)
            middle = time.perf_counter()
            try:
                tokens, found = decode(graphs, prepared(graphs, sample, max_new_tokens), forced, max_new_tokens)
            except RequestError as error:
                differences.append(f"{sample.id}: the runtime refuses it: {error}")
                continue
            seconds["torch"] += middle - start
            seconds["runtime"] += time.perf_counter() - middle
            if tokens != expected:
                differences.append(f"{sample.id}: {first_difference(expected, tokens)}")
            distances += map(memory_difference, found, memories)
        equal += len(differences) == known
    worst = max(distances, default=0.0)
    return ParityReport(
        graphs=True,
        passed=bool(samples) and equal == len(samples) and worst <= tolerance,
        items=len(samples),
        greedy_equal=equal,
        memories=len(distances),
        max_memory_difference=worst,
        tolerance=tolerance,
        differences=tuple(differences[:5]),
        seconds=seconds,
    )


def comparable(model: VisMemModel, samples: Iterable[Sample], most: int) -> list[Sample]:
    """The samples of at most so many patches: attention over them is dense, and a server refuses the others too.

    UserError where none is left.
    """
    kept = []
    for sample in samples:
        with suppress(RequestError):  # of an image that makes no patches
            sizes = [Image.open(io.BytesIO(data)).size for data in sample.images]
            check_patches(sum(model.backbone.patch_counts(sizes)), most)
            kept.append(sample)
    if not kept:
        raise UserError(too_large(most))
    return kept


def too_large(patches: int) -> str:
    """What is said where no test question is small enough."""
    return (
        f"the images of every test question drawn for parity make more than {patches} patches, which no server of the "
        "graphs takes: set memory.image_pixels, or export.graphs: false"
    )


def prepared(graphs: OnnxExecutor, sample: Sample, max_new_tokens: int) -> Question:
    """The sample as the graphs' executor takes it. RequestError for a video: it takes none."""
    if sample.videos:
        raise RequestError("an exported bundle answers questions about images only, and this one has a video")
    images = [Image.open(io.BytesIO(data)) for data in sample.images]
    return replace(graphs.prepare(images, sample.turns(), max_new_tokens), id=sample.id)


@torch.inference_mode()
def decode(executor: Executor, sample: Any, forced: dict[int, MemoryKind], max_new_tokens: int) -> Decoding:
    """An executor's greedy answer, by itself. `forced`: the decisions, from 0, at which memories are inserted."""
    recorded = {row_key(sample.id, 0): list(forced.items())}
    policy: InvocationPolicy = Replay(recorded=recorded) if forced else Learned()
    loop = DecodeLoop(executor)
    with recorded_memories(executor) as memories:
        (row,) = loop.join(Request([sample], policy, max_new_tokens))
        while loop.step():
            pass
    return tuple(token for token, _, _ in row.tokens), memories


@contextmanager
def recorded_memories(executor: Executor) -> Iterator[Memories]:
    """Within the block, every memory that `executor` forms for its first row is kept."""
    kept: Memories = []
    original = executor.form

    def form(kind: MemoryKind, rows: Sequence[int]) -> Any:
        memory = original(kind, rows)
        kept.append(np.asarray(torch.as_tensor(memory[0]).float().cpu()))
        return memory

    executor.form = form  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        del executor.form


def memory_difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The largest absolute difference of two memories; infinite where shapes differ or a number is not finite."""
    difference = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else math.inf
    return difference if math.isfinite(difference) else math.inf


def first_difference(reference: Sequence[int], found: Sequence[int]) -> str:
    """Where two token sequences part, in words."""
    pairs = enumerate(zip_longest(found, reference, fillvalue="the end"))
    place, (ours, theirs) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
    return f"token {place} is {ours}, torch gives {theirs}"
