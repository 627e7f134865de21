"""The one training loop: what is trained, and how a batch is made and scored, is the objective's.

Everything random is drawn from the seed and the step, and checkpoints hold weights and optimiser state, so a run that
was killed and resumed equals one that was not.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console
from torch import Tensor, nn

from vismem.errors import UserError
from vismem.progress import progress
from vismem.ranks import share_of_work
from vismem.training.checkpoint import Checkpoint, Curve, TrainState
from vismem.training.optimizers import master_weights, optimizers, round_masters

REDUCED = 2**26  # numbers of gradients that processes add up in a call
Metrics = dict[str, float]
SAVED_EVERY, SAVING = 600.0, 10  # seconds between checkpoints, or so many times what the last one took, if that is more
SHOWN = ("loss", "reward", "kl", "accuracy")  # beside the progress, where an objective has them


class Objective(Protocol):
    """One kind of training: how to collect a batch, and how to put its gradient into the parameters."""

    def collect(self, step: int) -> Any:
        """Make the batch of a step (for GRPO: sample rollouts and score them)."""

    def backward(self, batch: Any) -> Metrics:
        """Add the batch's gradient to `.grad` of the trained parameters and return what to log."""


@dataclass(frozen=True)
class LoopSettings:
    """Length, learning rates and checkpoints of a training."""

    name: str
    steps: int
    learning_rate: float
    warmup_ratio: float
    matrix_learning_rate: float = 0.0  # Muon's peak rate on the matrices; 0: AdamW on everything
    rates: Mapping[str, float] = field(default_factory=dict)  # peak rates of single parameters, by name
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    updates: int = 1
    target_kl: float = 0.0  # ends a batch's updates once its `update_kl` metric exceeds it; 0: never
    checkpoint_every: int = 50


def lr_scale(step: int, settings: LoopSettings) -> float:
    """The learning rate's factor: linear warm-up, then cosine to zero."""
    warmup = max(1, round(settings.warmup_ratio * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def train(
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    settings: LoopSettings,
    out: Path,
    accelerator: Accelerator,
) -> TrainState:
    """Optimise `parameters`; every step's figures are in `out/NAME.csv`. A checkpoint in `out` is resumed."""
    main = accelerator.is_main_process
    with master_weights(parameters) as masters:
        weights = list(masters.values())
        peaks = settings.learning_rate, settings.matrix_learning_rate
        used = optimizers(masters, *peaks, settings.weight_decay, settings.rates)
        groups = [group for optimizer in used for group in optimizer.param_groups]
        checkpoint = Checkpoint(out / f"{settings.name}.checkpoint", used)
        state = checkpoint.load()
        broadcast_parameters(weights, state.steps, checkpoint.file, accelerator)
        round_masters(masters, parameters)
        curve = Curve(out / f"{settings.name}.csv", state.steps) if main else None
        if state.steps:
            Console(quiet=not main, stderr=True).print(f"{settings.name}: resumed at step {state.steps}")
        saved, took = time.monotonic(), 0.0
        with progress(settings.name, settings.steps, state.steps, quiet=not main) as advance:
            for step in range(state.steps, settings.steps):
                started = time.perf_counter()
                batch, metrics = objective.collect(step), Metrics()
                for update in range(settings.updates):
                    for weight in weights:
                        weight.grad = None
                    metrics |= objective.backward(batch)
                    if update and 0 < settings.target_kl < metrics.get("update_kl", 0.0):
                        break
                    all_reduce_gradients(weights, accelerator)
                    metrics["gradient_norm"] = float(nn.utils.clip_grad_norm_(weights, settings.max_grad_norm))
                    for group in groups:
                        group["lr"] = group["peak"] * lr_scale(step, settings)
                    for optimizer in used:
                        optimizer.step()
                    round_masters(masters, parameters)
                if not math.isfinite(nn.utils.get_total_norm(weights)):
                    raise UserError(_diverged(settings.name, step, metrics))
                seconds = time.perf_counter() - started
                state = TrainState(step + 1, state.seconds + seconds, {"step": step, **metrics})
                advance(**{name: metrics[name] for name in SHOWN if name in metrics})
                if curve is not None:
                    curve.append(state.last)
                    due = state.steps % settings.checkpoint_every == 0 or state.steps == settings.steps
                    began = time.monotonic()
                    if due or began - saved >= max(SAVED_EVERY, SAVING * took):
                        curve.sync()
                        checkpoint.save(state)
                        saved = time.monotonic()
                        took = saved - began
    return state


def _diverged(name: str, step: int, metrics: Metrics) -> str:
    figures = ", ".join(f"{figure} {metrics[figure]:g}" for figure in ("loss", "gradient_norm") if figure in metrics)
    kept = "no checkpoint holds them; lower its learning rate"
    return f"{name}: step {step} made weights that are infinite or no numbers ({figures}): {kept}"


def shard_batch(chosen: Sequence[int], accelerator: Accelerator, together: int = 1) -> list[int]:
    """This process's shard of a batch: `together` processes have the same one. UserError as from `check_shards`."""
    check_shards(len(chosen), accelerator, together)
    own, shards = share_of_work(accelerator, together)
    return list(chosen[own::shards])


def check_shards(batch_size: int, accelerator: Accelerator, together: int) -> None:
    """UserError where a batch has no equal shards; of equal shards the mean of means is the batch's mean."""
    _, shards = share_of_work(accelerator, together)
    if batch_size % shards:
        raise UserError(
            f"a batch of {batch_size} questions cannot be shared equally among {shards} processes: make batch_size "
            f"a multiple of {shards}, or launch as many processes as divide {batch_size}"
        )


def all_reduce_sum(values: Metrics, accelerator: Accelerator) -> Metrics:
    """The sums of the processes' figures, the same in all of them; every process names them in the same order."""
    mine = torch.tensor(list(values.values()), dtype=torch.double, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(mine, reduction="sum").tolist(), strict=True))


def all_reduce_mean(values: Metrics, accelerator: Accelerator) -> Metrics:
    """The means of the processes' figures, which are means over equal shards of a batch."""
    return {name: value / accelerator.num_processes for name, value in all_reduce_sum(values, accelerator).items()}


def broadcast_parameters(parameters: Sequence[nn.Parameter], step: int, file: Path, accelerator: Accelerator) -> None:
    """Copy the main process's parameters to all others. UserError where they have not read the same checkpoint.

    Sums of floats may differ between devices; processes that begin with small differences would keep them.
    """
    if accelerator.num_processes == 1:
        return
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"the processes do not read the same {file} and would resume at steps {steps}: put it on shared storage"
        )
    for parameter in parameters:
        broadcast(parameter.data, from_process=0)


def all_reduce_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Add up the processes' gradients. Objectives divide by the whole batch, so the sum is its gradient.

    A call takes as many parameters as have REDUCED numbers: those of adapters in one.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if accelerator.num_processes == 1:
        return
    parts: list[list[Tensor]] = []
    held = 0  # numbers in the last part
    for gradient in gradients:
        held += gradient.numel()
        if not parts or held > REDUCED:
            parts.append([])
            held = gradient.numel()
        parts[-1].append(gradient)
    for part in parts:
        summed = accelerator.reduce(torch.cat([each.flatten() for each in part]), reduction="sum")
        for gradient, piece in zip(part, summed.split([each.numel() for each in part]), strict=True):
            gradient.copy_(piece.view_as(gradient))


def batch_at(step: int, count: int, size: int, seed: int) -> list[int]:
    """The indices of one step's batch. Each pass over `count` items has a new order and drops an incomplete batch."""
    size = min(size, count)
    epoch, place = divmod(step, count // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()
    return order[place * size : (place + 1) * size]
