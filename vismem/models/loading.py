"""How weights are read: in silence (`vismem.progress` shows what takes long), and whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging

from vismem.errors import UserError, first_line


@contextmanager
def no_weight_bars() -> Iterator[None]:
    """A block without transformers' bars over the tensors that it reads and writes; a hub's download keeps its own."""
    before = logging.set_tqdm_hook(lambda bar, arguments, options: logging.EmptyTqdm(*arguments, **options))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def read_weights(*files: Path) -> dict[str, Tensor]:
    """The tensors of all files, by name. UserError for a damaged one."""
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({first_line(error)}): restore it, or train it again") from None
    return found


def take_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load all of a model's weights. UserError where others are given, or of other sizes."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        said = str(error).splitlines()[1].strip()[:200]
        raise UserError(f"the weights in {source} do not fit, it was trained on another base: {said}") from None
