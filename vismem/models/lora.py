"""Low-rank adapters that are switched on and off: the formers' while a memory is formed (paper Sec. 3.3), the policy's
where it was trained.

They hang on forward hooks, so the base keeps its modules, names and weights. Vision encoders that fuse q, k and v in
one linear layer (Qwen2.5-VL) are adapted on slices of that layer's output, which no general LoRA library offers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vismem.models.tensor_parallel import share, whole


@dataclass(frozen=True)
class LoraTarget:
    """A linear module by its full path, and the output columns to adapt."""

    name: str
    module: nn.Linear
    start: int
    stop: int


@dataclass(frozen=True)
class LoraSettings:
    """An adapter's size; for the policy's, where it is.

    On every linear layer of the language model or on q_proj and v_proj only, and with `vision` on the vision encoder's
    q and v too.
    """

    rank: int
    alpha: float
    dropout: float
    every_linear: bool = False
    vision: bool = False


class Lora(nn.Module):
    """`y[..., start:stop] += (alpha / r) * B(A(dropout(x)))` on every target, inside `with lora.active():`.

    B starts at zero, so a fresh adapter changes nothing.
    """

    def __init__(self, targets: list[LoraTarget], settings: LoraSettings) -> None:
        super().__init__()
        self.settings, self.scale = settings, settings.alpha / settings.rank
        self.dropout = nn.Dropout(settings.dropout)
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        self.adapted: Tensor | None = None  # (R,) whether each row of a batch has the adapter; None: all have it
        self.targets: dict[str, LoraTarget] = {}
        self.hooks: list[RemovableHandle] = []
        for target in targets:
            key = f"{target.name}.{target.start}".replace(".", "_")
            down = torch.empty(settings.rank, target.module.in_features)
            nn.init.kaiming_uniform_(down, a=5**0.5)
            self.down[key] = nn.Parameter(down)
            self.up[key] = nn.Parameter(torch.zeros(target.stop - target.start, settings.rank))
            self.targets[key] = target

    @property
    def enabled(self) -> bool:
        """Whether the adapter is on. One that is off leaves no hook, so it costs nothing."""
        return bool(self.hooks)

    @enabled.setter
    def enabled(self, on: bool) -> None:
        if on and not self.hooks:
            for key, target in self.targets.items():
                self.hooks.append(target.module.register_forward_hook(partial(self._add, key, target)))
        while self.hooks and not on:
            self.hooks.pop().remove()

    def _add(
        self, key: str, target: LoraTarget, module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """The forward hook of a target: its output with the adapter's part."""
        down, up = self.down[key], self.up[key]
        states = whole(inputs[0], module.in_features).to(down.dtype)
        if self.training:
            states = self.dropout(states)
        delta = self.scale * (states @ down.T @ up.T)
        if self.adapted is not None:
            delta = delta * self.adapted.view(-1, *[1] * (delta.dim() - 1))
        if len(up) < module.out_features:
            delta = nn.functional.pad(delta, (target.start, module.out_features - target.stop))
        return output + share(delta, output.shape[-1]).to(output.dtype)

    @contextmanager
    def active(self, on: bool = True) -> Iterator[None]:
        """Switch the adapters on (or off) within the block, and back after it."""
        before, self.enabled = self.enabled, on
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def rows(self, on: Sequence[bool]) -> Iterator[None]:
        """Within the block, adapters that are on are so for the rows `on` of a batch (R, ..., d) alone."""
        before = self.enabled, self.adapted
        self.enabled = self.enabled and any(on)
        if self.enabled and not all(on):
            self.adapted = torch.tensor(on, device=next(iter(self.down.values())).device)
        try:
            yield
        finally:
            self.enabled, self.adapted = before

    @contextmanager
    def weights(self, down: nn.ParameterDict, up: nn.ParameterDict) -> Iterator[None]:
        """Within the block, the adapters have the matrices A of `down` and B of `up`, which are named as their own."""
        own = self.down, self.up
        self.down, self.up = down, up
        try:
            yield
        finally:
            self.down, self.up = own
