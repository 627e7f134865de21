"""Weights below float32 are trained through float32 masters: a bfloat16 run is its float32 twin, rounded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from vismem.training.loop import LoopSettings, train
from vismem.training.optimizers import master_weights, round_masters

HALVES = [torch.bfloat16, torch.float16]
SETTINGS = {"steps": 40, "learning_rate": 1e-3, "warmup_ratio": 0.1, "rates": {"second": 5e-4}, "checkpoint_every": 10}


class Pull:
    """Two weights under gradients that need no rounding, the second added up over micro-batches."""

    def __init__(self, dtype: torch.dtype, killed_at: int = -1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(4, 8, generator=generator).to(torch.bfloat16).to(dtype))
        self.second = nn.Parameter(torch.ones(8, dtype=dtype))
        self.killed_at = killed_at

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {"first": self.first, "second": self.second}

    def collect(self, step: int) -> float:
        if step == self.killed_at:
            raise KeyboardInterrupt
        return 1.0 + step % 2

    def backward(self, batch: float) -> dict[str, float]:
        (self.first.sum() * batch).backward()
        for part in (256.0, 1.0, 1.0, -256.0):  # in bfloat16 256 + 1 is 256
            (self.second.sum() * part * batch).backward()
        return {}


def run(pull: Pull, out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    settings = LoopSettings("run", **{**SETTINGS, **changes})  # type: ignore[arg-type]
    train(pull, pull.parameters, settings, out, Accelerator(cpu=True))
    return {name: weight.detach().clone() for name, weight in pull.parameters.items()}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"max_grad_norm": 1e9, "weight_decay": 0.5}, {"matrix_learning_rate": 3e-3}, {"updates": 3}],
    ids=["clipped", "decayed", "Muon", "updates"],
)
def test_a_run_of_lower_precision_is_its_float32_twin_rounded(
    dtype: torch.dtype, changes: dict[str, float], tmp_path: Path
) -> None:
    twin = run(Pull(torch.float32), tmp_path / "twin", **changes)
    found = run(Pull(dtype), tmp_path / "run", **changes)
    before = Pull(dtype).parameters
    for name, weight in found.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, twin[name].to(dtype)), name
        assert not torch.equal(weight, before[name]), name


def test_the_checkpoint_holds_masters_and_a_resumed_run_equals_the_unbroken_one(tmp_path: Path) -> None:
    unbroken = run(Pull(torch.bfloat16), tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        run(Pull(torch.bfloat16, killed_at=25), tmp_path / "killed")
    held = load_file(tmp_path / "killed" / "run.checkpoint")
    assert {value.dtype for value in held.values()} == {torch.float32}
    run(Pull(torch.bfloat16), tmp_path / "killed")
    ends = [load_file(tmp_path / name / "run.checkpoint") for name in ("unbroken", "killed")]
    assert ends[0].keys() == ends[1].keys()
    assert [key for key in ends[0] if not torch.equal(ends[0][key], ends[1][key])] == []
    resumed = run(Pull(torch.bfloat16), tmp_path / "killed")  # from the end: nothing is left to do
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_gradients_stay_with_a_parameter_after_training(tmp_path: Path) -> None:
    """A hook left behind would keep the masters alive: 8 bytes per parameter."""
    pull = Pull(torch.bfloat16)
    run(pull, tmp_path, steps=2)
    assert pull.first.grad is None
    pull.backward(1.0)
    assert torch.equal(pull.first.grad, torch.ones_like(pull.first))


def test_a_float32_weight_is_its_own_master() -> None:
    pull = Pull(torch.float32)
    with master_weights(pull.parameters) as masters:
        pull.backward(1.0)
        assert all(masters[name] is weight for name, weight in pull.parameters.items())
        before = pull.second.detach().clone()
        round_masters(masters, pull.parameters)
        assert torch.equal(pull.second, before)
