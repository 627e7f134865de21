"""A base that is larger than one GPU: the processes of a step hold its language model together (tensor parallelism).

Each has some of every attention's heads and of every MLP's columns, as transformers' plans for the families say;
embeddings, head, vision encoder and what VisMem adds are whole in each. All do the same work on the same rows, so they
meet at every layer, and each ends with the same figures to the last digit.
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd import Function

from vismem.errors import UserError
from vismem.ranks import is_rank

WHOLE = {"lm_head": "replicate", "model.language_model.embed_tokens": "replicate"}  # in place of transformers' own


def sharded(settings: Any) -> dict[str, Any]:
    """What `from_pretrained` is told besides, given the language model's settings; nothing where this process is alone.

    UserError as from `check_shares`.
    """
    if not is_rank():
        return {}
    from transformers.distributed import DistributedConfig

    check_shares(settings, processes := distributed.get_world_size())
    return {"distributed_config": DistributedConfig(tp_size=processes, tp_plan=WHOLE)}


def check_shares(settings: Any, processes: int) -> None:
    """UserError where the language model of these settings cannot be shared equally by so many processes."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (count := int(getattr(settings, name))) % processes:
            raise UserError(f"base.tensor_parallel: {processes} processes cannot share the base's {name} of {count}")


def whole(part: Tensor, width: int) -> Tensor:
    """All columns (..., width), of which this process has its share; as it is where it has all."""
    result: Tensor = part if part.shape[-1] == width else _Gather.apply(part, width)  # type: ignore[no-untyped-call]
    return result


def share(columns: Tensor, width: int) -> Tensor:
    """This process's `width` of all columns; as they are where these are all."""
    result: Tensor = columns if columns.shape[-1] == width else _Share.apply(columns, width)  # type: ignore[no-untyped-call]
    return result


def agreed(chosen: Tensor, processes: int) -> Tensor:
    """What the first of so many processes chose: sums may differ in their last digits, and all must go on alike."""
    if processes > 1:
        distributed.broadcast(chosen, 0)
    return chosen


def mean(values: Tensor, processes: int) -> Tensor:
    """The mean of what so many processes found, each of its own share; `values` may be overwritten."""
    if processes > 1:
        distributed.all_reduce(values.div_(processes))
    return values


class _Gather(Function):
    """Every process computes the same of the columns, so a gradient's own share is the whole of it."""

    @staticmethod
    def forward(context: Any, part: Tensor, width: int) -> Tensor:
        context.own = part.shape[-1]
        return _gathered(part, width)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _own(gradient, context.own), None


class _Share(Function):
    @staticmethod
    def forward(context: Any, columns: Tensor, width: int) -> Tensor:
        context.all = columns.shape[-1]
        return _own(columns, width)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient, context.all), None


def _gathered(part: Tensor, width: int) -> Tensor:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(width // part.shape[-1])]
    if distributed.is_initialized():  # not in a plan, which asks for the size alone
        distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts, dim=-1)


def _own(columns: Tensor, width: int) -> Tensor:
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    return columns.narrow(-1, rank * width, width).contiguous()
