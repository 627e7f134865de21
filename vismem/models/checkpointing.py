"""Gradient checkpointing of a frozen base's blocks, with a growing cache and adapters that come and go.

Hugging Face's own drops the cache, and an adapter that is off again when the backward pass runs a layer once more
loses its gradients. Here a layer is a function of its input and of what its cache held, and the adapters' switches
are put back while it runs again. Blocks are run again one by one, so that the activations of one are held at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vismem.models.backbones.base import Backbone
from vismem.models.lora import Lora


def recomputed(function: Callable[..., Any], *args: Any, adapters: Sequence[Lora]) -> Any:
    """`function(*args)`, of which the arguments alone are kept for the backward pass.

    It runs the function again, with the adapters switched as they are now.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    again = _switched({adapter: adapter.enabled for adapter in adapters})
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again))


@contextmanager
def checkpointed(backbone: Backbone, adapters: Sequence[Lora]) -> Iterator[None]:
    """Within the block, each layer of the language model is `recomputed`, and all that goes `backbone.through`."""
    layers = list(backbone.model.model.language_model.layers)  # Hugging Face's, in the order of their caches
    for index, layer in enumerate(layers):
        layer.forward = _recomputing(layer.forward, index, adapters)
    backbone.through = partial(recomputed, adapters=adapters)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        del backbone.through


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
        if not torch.is_grad_enabled():  # the cache takes the keys itself
            return plain(hidden, *args, past_key_values=past_key_values, **kwargs)

        def run(hidden: Tensor, *held: Tensor) -> tuple[Tensor, ...]:
            cache = _LayerCache(held)
            return (plain(hidden, *args, past_key_values=cache, **kwargs), *cache.added)

        held: tuple[Tensor, ...] = ()
        if past_key_values is not None and len(past_key_values.layers) > index:
            held = past_key_values.layers[index].keys, past_key_values.layers[index].values
        output: Tensor
        output, *added = recomputed(run, hidden, *held, adapters=adapters)
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
