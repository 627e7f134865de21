"""Rows looked at by several threads: decoding and hashing pictures release the interpreter lock."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # of this process
THREADS = min(16, CORES)  # a seventh of the work on a photo holds the lock: more would wait for it


def in_order(do: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What `do` returns for each item, in their order; it runs in THREADS, on few items that are read ahead.

    What `items` or `do` raises ends it.
    """
    ahead, pool = deque[Future[R]](), ThreadPoolExecutor(THREADS)
    try:
        for item in items:
            ahead.append(pool.submit(do, item))
            if len(ahead) == 2 * THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
