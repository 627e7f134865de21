"""Runs this library's own code on tensors that have shapes only, and counts what it holds and computes.

Weights and all that is computed of them live on torch's meta device, without values; whole numbers and bools keep
theirs, since they say which shapes come next. So a step of a model of any size runs on a laptop, in the code that
trains it.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# Without gradients these come whole; on the way to autograd torch cuts them into parts, whose bytes and FLOP count.
COMPOSED = (aten.scaled_dot_product_attention.default, aten.linear.default, aten.matmul.default)
Cost = Callable[[int, int, torch.dtype], float]  # seconds of an operation's FLOP and bytes read and written
LABELS = {  # what a tensor counts as, by the function that allocates it, the innermost first
    "RowCache.reserve": "KV cache",
    "RowCache.update": "KV cache",
    "DynamicLayer.update": "KV cache",
    "_LayerCache.update": "KV cache",
    "token_scores": "logits",
    "VisMemModel.short_stream": "short memories' stream",
    "ShortFormer.forward": "forming short memories",
    "LongFormer.prefill": "long memories' cache",
    "LongFormer.forward": "forming long memories",
    "QueryBuilder.forward": "query builder",
    "encode": "reading images",
    "Context.read": "reading prompts",
    "DecodeState.join": "rows' embeddings and states",
    "_Pass.hidden": "answers read back",
    "_engine_run_backward": "backward pass",
}
OTHER = "other"


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block (and `beside_dispatch`) floats are shapes. Counts living bytes by part, and seconds.

    Without `hollow` values are computed too: that is what a plan is compared with.
    """

    def __init__(self, cost: Cost | None = None, hollow: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost, self.hollow = cost, hollow
        self.rest = OTHER  # the part of what no function of LABELS allocates
        self.live: Counter[str] = Counter()
        self.total = 0
        self.held: dict[int, Any] = {}  # weak references to the storages that are counted
        self.restart()

    def restart(self) -> None:
        """Forget the peak and the seconds so far."""
        self.peak, self.at_peak, self.seconds = self.total, dict(self.live), 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What no function of LABELS allocates within the block counts as this part."""
        before, self.rest = self.rest, name
        try:
            yield
        finally:
            self.rest = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSED:
            attention = self.hollow and func is aten.scaled_dot_product_attention.default
            with self:
                return (_attention if attention else func.decompose)(*args, **kwargs)
        result = _hollow(func, args, kwargs) if self.hollow else func(*args, **kwargs)
        made = _tensors((result,))
        for tensor in made:
            self.count(tensor)
        if self.cost and any(tensor.is_meta for tensor in made) and not _is_view(func):
            packet = func._overloadpacket
            flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
            moved = sum(tensor.nbytes for tensor in (*made, *_tensors((args, kwargs))))
            self.seconds += self.cost(flops, moved, made[0].dtype)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's bytes for as long as it lives; operations' results are counted as they come."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.held or not size:
            return
        part = self._part()

        def freed(_: Any) -> None:
            del self.held[key]
            self.live[part] -= size
            self.total -= size

        self.held[key] = weakref.ref(storage, freed)
        self.live[part] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)

    def _part(self) -> str:
        frame: Any = sys._getframe(2)
        while frame is not None:
            if part := LABELS.get(frame.f_code.co_qualname):
                return part
            frame = frame.f_back
        return self.rest


@contextmanager
def beside_dispatch() -> Iterator[None]:
    """Within the block what the dispatcher does not see is replaced: values of shapes, and the choice of a kernel."""
    with torch.device("cpu"):  # torch notes once which functions heed a device: what stands here must not be noted
        tensor, tolist = torch.tensor, Tensor.tolist
        torch.empty(0)

    def known(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return tensor(*args, **kwargs)

    def zeros(self: Tensor) -> Any:
        return tolist(torch.zeros(self.shape, dtype=torch.int64) if self.is_meta else self)

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")  # type: ignore[no-untyped-call]
    with patch.object(torch, "tensor", known), patch.object(Tensor, "tolist", zeros):
        yield
    del library


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **more: Any) -> Tensor:
    """What CUDA's memory-efficient kernel holds, the one that takes a mask."""
    if more.get("enable_gqa"):
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    if attn_mask is not None:
        attn_mask = query.new_zeros(attn_mask.shape) if attn_mask.dtype == torch.bool else attn_mask
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    attended: Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled()
    )[0]
    return attended


def _is_view(func: Any) -> bool:
    """Whether the operation moves nothing; `_unsafe_view`, behind a linear layer, does not say so."""
    return func.is_view or func is aten._unsafe_view.default


def _hollow(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation with floats on the meta device, and with whole numbers and bools on the CPU."""
    tensors = _tensors((args, kwargs))
    shaped = any(each.is_meta for each in tensors)
    if func is aten._local_scalar_dense.default and shaped:
        return 0.0
    if "device" in kwargs or (not tensors and any(each.name == "device" for each in func._schema.arguments)):
        whole = func._overloadpacket in (aten.arange, aten.randperm) and all(isinstance(each, int) for each in args)
        default = torch.int64 if whole else torch.get_default_dtype()
        kind = kwargs.get("dtype") or (tensors[0].dtype if tensors else default)
        if shaped and not kind.is_floating_point:  # values of floats that there are not
            return torch.zeros(tensors[0].shape, dtype=kind)
        shaped = shaped or (kind.is_floating_point and not tensors)  # pixels keep values until a weight reads them
        kwargs = {**kwargs, "device": torch.device("meta" if shaped else "cpu")}
    if not shaped:
        return func(*args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("generator", "pin_memory")}
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        masks = [each is not None and each.dtype == torch.bool for each in args[1]]  # how many marks depends on values
        places = [each.nonzero().unbind(1) if mask else (each,) for each, mask in zip(args[1], masks, strict=True)]
        args = (args[0], [*chain.from_iterable(places)], *args[2:])
    args, kwargs = tree_map_only(Tensor, lambda each: each.to("meta") if each.dim() else each, (args, kwargs))
    return _made_before(func, args, kwargs)


_MADE: dict[Any, Any] = {}  # shape, stride and type of results: torch's own rules in Python take most of the time


def _made_before(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result on the meta device, from memory where the same operation was done on the same shapes."""
    key = (func, torch.get_default_dtype(), _key(args), _key(kwargs.items()))
    if key in _MADE:  # never of a view, nor of what changes its arguments
        shape, stride, kind = _MADE[key]
        return torch.empty_strided(shape, stride, dtype=kind, device="meta")
    result = func(*args, **kwargs)
    if isinstance(result, Tensor) and result.is_meta and result.dtype.is_floating_point:
        taken = {each.untyped_storage()._cdata for each in _tensors((args, kwargs))}
        if result.untyped_storage()._cdata not in taken:
            _MADE[key] = result.shape, result.stride(), result.dtype
    return tree_map_only(Tensor, _values, result)


def _key(values: Any) -> tuple[Any, ...]:
    """What a result's shape depends on."""
    return tuple(
        (value.shape, value.stride(), value.dtype)
        if isinstance(value, Tensor)
        else (type(value), _key(value) if isinstance(value, list | tuple) else value)
        for value in values
    )


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in nested arguments or results; written out, since it runs at every operation."""
    found: list[Tensor] = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | dict):
            found += _tensors(value)
    return found


def _values(tensor: Tensor) -> Tensor:
    """Whole numbers that were computed of floats: zeros."""
    known = not tensor.is_meta or tensor.dtype.is_floating_point or tensor.dtype.is_complex
    return tensor if known else torch.zeros(tensor.shape, dtype=tensor.dtype)
