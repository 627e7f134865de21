"""Readers of visual questions: one file per format, and the choice among them."""

from collections.abc import Callable, Iterator
from typing import Any

from vismem.config import EasyVqaSource, JsonlSource, LmuDataSource, LocalFiles, NlvrSource, ScenesSource, Source
from vismem.data.benchmarks import counted
from vismem.data.readers import easy_vqa, jsonl, lmudata, nlvr
from vismem.data.sample import Sample
from vismem.data.scenes import generate

DRAWN: dict[type, Callable[[Any, str, int], Iterator[Sample]]] = {EasyVqaSource: easy_vqa.read, ScenesSource: generate}
# Sources of one split.
WHOLE: dict[type, Callable[[Any], Iterator[Sample]]] = {
    JsonlSource: jsonl.read,
    LmuDataSource: lmudata.read,
    NlvrSource: nlvr.read,
}


def read(source: Source, split: str, seed: int) -> Iterator[Sample]:
    """The source's samples for one split, in a fixed order; of those that count at most its limit.

    UserError where it cannot be read.
    """
    if isinstance(source, EasyVqaSource | ScenesSource):
        yield from DRAWN[type(source)](source, split, seed)
    elif isinstance(source, LocalFiles) and split == source.split:
        left = source.limit
        for sample in WHOLE[type(source)](source):
            if left == 0:
                return
            if left is not None:
                left -= counted(sample)
            yield sample
