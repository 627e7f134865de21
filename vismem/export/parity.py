"""Does the runtime say what torch says? Greedy tokens must be equal, memories within a tolerance."""

import io
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vismem.data.sample import Sample
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Learned, Replay, row_key
from vismem.generation.types import LATENT
from vismem.models.kinds import MemoryKind
from vismem.models.memory import FormationInputs
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel
from vismem.records import ParityReport
from vismem.serving.runtime.limits import RequestError
from vismem.serving.runtime.runtime import Kind, Runtime

Memories = list[NDArray[np.float32]]
Decoding = tuple[tuple[int, ...], Memories]  # an answer's token ids, LATENT where a memory vector stands; its memories


def check_parity(
    model: VisMemModel, runtime: Runtime, samples: Sequence[Sample], *, max_new_tokens: int, tolerance: float
) -> ParityReport:
    """Decode every sample twice in both engines and compare the answers and the memories.

    Once the model invokes as it likes, once both memories are forced at the answer's start, so that formation is
    compared even where the policy never invokes. `max_memory_difference` is the largest absolute difference of any
    number in any memory. A difference is reported, never raised.
    """
    equal = 0
    differences: list[str] = []
    distances: list[float] = []
    seconds = {"torch": 0.0, "runtime": 0.0}
    for place, sample in enumerate(samples):
        known = len(differences)
        # One memory at the answer's start and the other after its first word, the order changing from item to item.
        both = {0: KINDS[place % 2], 2: KINDS[place % 2].other}
        for forced in ({}, both):
            start = time.perf_counter()
            expected, reference = decode_torch(model, sample, forced, max_new_tokens)
            middle = time.perf_counter()
            try:
                tokens, memories = decode_runtime(model, runtime, sample, forced, max_new_tokens)
            except RequestError as error:
                differences.append(f"{sample.id}: the runtime refuses it: {error}")
                continue
            seconds["torch"] += middle - start
            seconds["runtime"] += time.perf_counter() - middle
            if tokens != expected:
                differences.append(f"{sample.id}: {first_difference(expected, tokens)}")
            distances += map(memory_difference, memories, reference)
        equal += len(differences) == known
    worst = max(distances, default=0.0)
    return ParityReport(
        passed=bool(samples) and equal == len(samples) and worst <= tolerance,
        items=len(samples),
        greedy_equal=equal,
        memories=len(distances),
        max_memory_difference=worst,
        tolerance=tolerance,
        differences=tuple(differences[:5]),
        seconds=seconds,
    )


def decode_torch(model: VisMemModel, sample: Sample, forced: dict[int, MemoryKind], max_new_tokens: int) -> Decoding:
    """The training engine's greedy answer, a batch of one."""
    key = row_key(sample.id, 0)
    policy: InvocationPolicy = Replay(recorded={key: list(forced.items())}) if forced else Learned()
    with recorded_memories(model) as memories:
        return generate(model, [sample], policy, max_new_tokens=max_new_tokens)[0].token_ids, memories


def decode_runtime(
    model: VisMemModel, runtime: Runtime, sample: Sample, forced: dict[int, MemoryKind], max_new_tokens: int
) -> Decoding:
    """The runtime's greedy answer, in the training engine's notation. RequestError for a video: it takes none."""
    if sample.videos:
        raise RequestError("an exported bundle answers questions about images only, and this one has a video")
    images = [Image.open(io.BytesIO(data)) for data in sample.images]
    force: dict[int, Kind] = {decision: kind.value for decision, kind in forced.items()}
    tokens: list[int] = []
    memories: Memories = []
    chunks = runtime.generate(images, sample.question, max_new_tokens=max_new_tokens, memory=not forced, force=force)
    for chunk in chunks:
        if chunk.token is not None:
            tokens.append(chunk.token)
        if chunk.memory is not None:
            memories.append(chunk.memory)
            tokens += [LATENT] * len(chunk.memory) + [model.end_ids[MemoryKind(chunk.event)]]
    return tuple(tokens), memories


@contextmanager
def recorded_memories(model: VisMemModel) -> Iterator[Memories]:
    """Within the block, every memory that `model` forms for its first row is kept."""
    kept: Memories = []
    original = model.form

    def form(kind: MemoryKind, inputs: FormationInputs) -> Tensor:
        memory = original(kind, inputs)
        kept.append(memory[0].float().cpu().numpy())
        return memory

    model.form = form  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        del model.form


def memory_difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The largest absolute difference of two memories; infinite where shapes differ or a number is not finite."""
    difference = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else math.inf
    return difference if math.isfinite(difference) else math.inf


def first_difference(reference: Sequence[int], found: Sequence[int]) -> str:
    """Where two token sequences part, in words."""
    pairs = enumerate(zip_longest(found, reference, fillvalue="the end"))
    place, (ours, theirs) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
    return f"token {place} is {ours}, torch gives {theirs}"
