"""Silence while Hugging Face models are read and written: `vismem.progress` shows what takes long."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_weight_bars() -> Iterator[None]:
    """A block without transformers' bars over the tensors that it reads and writes; a hub's download keeps its own."""
    before = logging.set_tqdm_hook(lambda bar, arguments, options: logging.EmptyTqdm(*arguments, **options))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
