"""Gradient checkpointing of a frozen base's decoder layers, with a growing cache and adapters that come and go.

Hugging Face's own drops the cache, and an adapter that is off again when the backward pass runs a layer once more
loses its gradients. Here a layer is a function of its input and of what its cache held, and the adapters' switches
are put back while it runs again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vismem.models.lora import Lora


@contextmanager
def checkpointed(layers: Iterable[nn.Module], adapters: Sequence[Lora]) -> Iterator[None]:
    """Within the block, each layer keeps its input alone for the backward pass, which runs the layer again.

    `layers` are Hugging Face's decoder layers, in the order of their caches.
    """
    layers = list(layers)
    for index, layer in enumerate(layers):
        layer.forward = _recomputing(layer.forward, index, adapters)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _LayerCache:
    """Stands in for a cache within one layer: what it held before, and what the layer adds."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        self.held = held
        self.added: tuple[Tensor, Tensor]

    def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.added = key, value
        if not self.held:
            return key, value
        return torch.cat([self.held[0], key], dim=2), torch.cat([self.held[1], value], dim=2)


def _recomputing(plain: Callable[..., Tensor], index: int, adapters: Sequence[Lora]) -> Callable[..., Tensor]:
    """A layer's `forward` that is checkpointed where gradients are computed."""

    def forward(hidden: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(hidden, *args, past_key_values=past_key_values, **kwargs)

        def run(hidden: Tensor, *held: Tensor) -> tuple[Tensor, ...]:
            cache = _LayerCache(held)
            return (plain(hidden, *args, past_key_values=cache, **kwargs), *cache.added)

        held: tuple[Tensor, ...] = ()
        if past_key_values is not None and len(past_key_values.layers) > index:
            held = past_key_values.layers[index].keys, past_key_values.layers[index].values
        again = _switched({adapter: adapter.enabled for adapter in adapters})  # around the second run
        output: Tensor
        output, *added = checkpoint(run, hidden, *held, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
        if past_key_values is not None:
            past_key_values.update(*added, index)
        return output

    return forward


@contextmanager
def _switched(adapters: dict[Lora, bool]) -> Iterator[None]:
    with ExitStack() as stack:
        for adapter, on in adapters.items():
            stack.enter_context(adapter.active(on))
        yield
