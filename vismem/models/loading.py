"""How weights are read: in silence (`vismem.progress` shows what takes long), and whole or not at all."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from transformers.utils import logging as transformers_logging

from vismem.errors import UserError, first_line
from vismem.models.backbones import backbone_of
from vismem.models.backbones.base import Backbone
from vismem.models.families import check_family
from vismem.models.processors import load_processor
from vismem.models.tensor_parallel import sharded

# What reading a model's files raises where one of them is damaged.
DAMAGED = (SafetensorError, StrictDataclassError, RuntimeError, ValueError, KeyError)
# Of a base's generation_config.json, what would change the probabilities of tokens, and its value where it does not.
NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}

logger = logging.getLogger(__name__)


@contextmanager
def no_weight_bars() -> Iterator[None]:
    """A block without transformers' bars over the tensors that it reads and writes; a hub's download keeps its own."""
    before = transformers_logging.set_tqdm_hook(
        lambda bar, arguments, options: transformers_logging.EmptyTqdm(*arguments, **options)
    )
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


@contextmanager
def tf32_beside(dtype: str) -> Iterator[None]:
    """A block in which GPUs multiply and convolve float32 in TF32 beside a bfloat16 base, which rounds more, else not.

    The whole process does: for commands, not for who loads a model in a process of their own.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = dtype == "bfloat16"
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


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


def check_processor(processor: Any, settings: Any, base: Path | str) -> None:
    """UserError where a processor writes other tokens for images than the model of these settings reads.

    transformers makes up a tokenizer of a few words where a base's own is missing.
    """
    written = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if written != settings.image_token_id:
        raise UserError(
            f"'{base}' has no tokenizer, or another model's: it writes images as token {written}, and the model reads "
            f"{settings.image_token_id}"
        )


def load_base(base: Path | str, dtype: str = "float32", tensor_parallel: bool = False) -> Backbone:
    """Load a hub id or a path with `from_pretrained`. UserError if it is missing, has no vision, or is unsupported.

    With `tensor_parallel`, all processes that torchrun started hold it together, each its share.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        settings = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
        check_family(settings.model_type)
        more = sharded(settings.text_config) if tensor_parallel else {}
        with no_weight_bars():
            model = AutoModelForImageTextToText.from_pretrained(
                str(base), dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True, **more
            )
        processor = load_processor(base)
    except (*DAMAGED, OSError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = first_line(error)
        raise UserError(f"no vision-language model at '{base}' (a hub id or a folder): {said}") from error
    check_processor(processor, settings, base)
    for name, neutral in NEUTRAL.items():
        if (value := getattr(model.generation_config, name, None)) not in (None, neutral):
            logger.warning(
                "'%s' sets %s=%s, which is not applied: tokens have the model's own probabilities", base, name, value
            )
    backbone = backbone_of(model, processor)
    backbone.processes = distributed.get_world_size() if more else 1
    return backbone
