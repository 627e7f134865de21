"""A base and what VisMem adds to it as shapes, from the base's small files; questions and answers of stated sizes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from vismem.config import BaseConfig
from vismem.data.sample import Sample
from vismem.errors import UserError, first_line
from vismem.generation.replay import with_memories
from vismem.generation.types import Rollout
from vismem.models.backbones import backbone_of
from vismem.models.backbones.base import Backbone
from vismem.models.families import check_family
from vismem.models.processors import load_processor
from vismem.models.tensor_parallel import WHOLE, check_shares
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel

QUESTION = "how many cups? " * 50  # about 200 tokens
ANSWER = "one cup, " * 80  # of reference, about 240 tokens
WORD = 5  # any token of the tokenizer


@dataclass(frozen=True)
class Questions:
    """What a run is planned for: questions about so many images of this width and height, and how many train it.

    `counted`: that number is known, not assumed.
    """

    size: tuple[int, int]
    images: int = 1
    train: int = 1000
    counted: bool = False


def hollow_base(config: BaseConfig, processes: int = 1) -> Backbone:
    """The base, within a block of `Shapes`: no weights are read. UserError for one that is not there or is unknown.

    With `tensor_parallel`, as one of so many processes holds it.
    """
    from transformers import AutoModelForImageTextToText, PreTrainedConfig

    with _there(config):
        settings = _settings(config)
        check_family(settings.model_type)
        written, _ = PreTrainedConfig.get_config_dict(_source(config))
        if "tie_word_embeddings" not in written and not settings.text_config.tie_word_embeddings:
            settings.tie_word_embeddings = False  # as before transformers 5; its default may tie a head of its own
        processor = load_processor(_source(config))
    model = AutoModelForImageTextToText.from_config(settings, dtype=getattr(torch, config.dtype))
    if config.tensor_parallel and processes > 1:
        check_shares(settings.text_config, processes)
        _keep_share(model, processes)
    return backbone_of(model, processor)


def stored_type(config: BaseConfig) -> torch.dtype:
    """The type that the base's weights are stored in, as its config.json says; `base.dtype` where it does not.

    UserError as from `hollow_base`.
    """
    with _there(config):
        kind: torch.dtype = _settings(config).dtype or getattr(torch, config.dtype)
    return kind


def _source(config: BaseConfig) -> str:
    return str(config.folder() or config.model)


def _settings(config: BaseConfig) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(_source(config), trust_remote_code=False)


@contextmanager
def _there(config: BaseConfig) -> Iterator[None]:
    """A block that reads the base's small files: what is wrong with them is a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read config.json and the processor's files of base.model '{_source(config)}': "
            f"{first_line(error)}. A folder with these small files is enough (--set base.model=FOLDER); no weights are "
            "read"
        ) from None


def _keep_share(model: Any, processes: int) -> None:
    """Cut the weights to what one of so many processes holds, by the same plan of transformers' as `sharded`."""
    for name, module in model.named_modules():
        style = (model.tp_plan | WHOLE).get(replace_layer_number_by_wildcard(name), "")
        if style.startswith(("colwise", "rowwise")):
            axis = 0 if style.startswith("colwise") else 1
            for own, weight in module.named_parameters():
                if axis < weight.dim():
                    part = weight.detach().narrow(axis, 0, weight.shape[axis] // processes)
                    setattr(module, own, nn.Parameter(part.clone()))


def parameters(model: nn.Module) -> dict[str, float]:
    """How many parameters each of a model's own modules has; a head that is the embeddings has none of its own."""
    found: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        found[name.removeprefix("model.").partition(".")[0]] += weight.numel()
    return dict(found)


def questions(count: int, asked: Questions) -> tuple[Sample, ...]:
    """`count` times QUESTION and ANSWER about so many images."""
    picture: Any = Image.new("RGB", asked.size)
    return tuple(Sample(f"{index}", (picture,) * asked.images, QUESTION, ANSWER) for index in range(count))


def answers(
    model: VisMemModel, samples: Sequence[Sample], group: int, words: int, memories: int
) -> tuple[Rollout, ...]:
    """`group` answers of `words` tokens for each sample, each with evenly spaced memories of both kinds in turn."""
    return tuple(
        _answer(model, sample.id, words, min(memories, words), row) for sample in samples for row in range(group)
    )


def _answer(model: VisMemModel, sample_id: str, words: int, memories: int, row: int) -> Rollout:
    said = (WORD,) * words
    plain = Rollout(sample_id, said, (True,) * words, (0.0,) * words, (), "", "", True, words)
    return with_memories(model, plain, {words * at // memories: KINDS[(row + at) % 2] for at in range(memories)})
