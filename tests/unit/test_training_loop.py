"""The training loop where numbers go wrong: nothing that is no number is kept, and what was good before is."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_stages import Slope
from torch import nn

from vismem.errors import UserError
from vismem.training import loop
from vismem.training.checkpoint import TrainState
from vismem.training.loop import LoopSettings, Metrics, train

SETTINGS = LoopSettings("run", steps=5, learning_rate=0.1, warmup_ratio=0.1, checkpoint_every=1)


class Odd(Slope):
    """A slope whose loss is multiplied by `factor` of the step."""

    def __init__(self, factor: Callable[[int], float], kl: float = 0.0) -> None:
        super().__init__(lambda weight, step: {"loss": weight * factor(step), "update_kl": kl})
        self.factor, self.updates = factor, list[int]()

    def backward(self, batch: int) -> Metrics:
        self.updates.append(batch)
        metrics = super().backward(batch)
        assert self.weight.grad is not None
        self.weight.grad *= self.factor(batch)
        return metrics


def run(objective: Slope, out: Path, settings: LoopSettings = SETTINGS) -> TrainState:
    return train(objective, {"weight": objective.weight}, settings, out, Accelerator(cpu=True))


@pytest.mark.parametrize("at", [0, 3, 4])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(
    factor: float, at: int, tmp_path: Path
) -> None:
    for _ in range(2):  # the second resumes, and comes to the same
        odd = Odd(lambda step: factor if step == at else 1.0)
        with pytest.raises(
            UserError, match=rf"run: step {at} .* \(loss {factor:g}, gradient_norm {factor:g}\): .* rate"
        ):
            run(odd, tmp_path)
        assert odd.updates[-1] == at
    assert (tmp_path / "run.checkpoint").exists() == (at > 0)
    if at:
        weight = load_file(tmp_path / "run.checkpoint")["parameter/weight"]
        assert weight.isfinite().all()
        assert len((tmp_path / "run.csv").read_text().splitlines()) == 1 + at
    assert run(Odd(lambda step: 1.0), tmp_path).steps == 5


def test_a_checkpoint_is_written_after_ten_minutes_however_few_steps_there_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, held, file = [0.0], list[int](), tmp_path / "run.checkpoint"
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))

    class Watched(Odd):
        def collect(self, step: int) -> int:
            now[0] += 250
            saved = safe_open(file, "pt").metadata()["train_state"] if file.is_file() else '{"steps": 0}'
            held.append(json.loads(saved)["steps"])
            return super().collect(step)

    settings, save = replace(SETTINGS, steps=7, checkpoint_every=50), loop.Checkpoint.save
    run(Watched(lambda step: 1.0), tmp_path, settings)
    assert held == [0, 0, 0, 3, 3, 3, 6]

    def slow(*given: Any) -> None:
        now[0] += 100
        save(*given)

    monkeypatch.setattr(loop.Checkpoint, "save", slow)
    held.clear()
    file.unlink()
    run(Watched(lambda step: 1.0), tmp_path, replace(settings, steps=9))
    assert held == [0, 0, 0, 3, 3, 3, 3, 7, 7], "saving takes a tenth of the time at most"


def test_a_batch_has_its_first_update_whatever_target_kl_says(tmp_path: Path) -> None:
    settings = replace(SETTINGS, updates=3, target_kl=0.1)
    for kl, updates in ((0.2, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), (0.05, sorted([*range(5)] * 3))):
        odd = Odd(lambda step: 1.0, kl)
        run(odd, tmp_path / str(kl), settings)
        assert odd.updates == updates
        assert float(odd.weight.detach()) != 1.0
        curve = pd.read_csv(tmp_path / str(kl) / "run.csv")
        assert curve["gradient_norm"].notna().all(), "that of the last update that was made"


def test_a_checkpoint_that_is_damaged_or_of_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    run(Odd(lambda step: 1.0), tmp_path)
    file = tmp_path / "run.checkpoint"
    whole, tensors = file.read_bytes(), load_file(file)
    state = {"train_state": '{"steps": 5, "seconds": 1.0, "last": {}}'}
    wide = nn.Parameter(torch.ones(3))  # a weight of one number could be copied into it

    def resumed(said: str, weight: nn.Parameter | None = None, name: str = "weight") -> None:
        slope = Slope(lambda weight, step: {"loss": weight})
        with pytest.raises(UserError, match=rf"run\.checkpoint is damaged, or of another .*{said}.*: delete it"):
            train(slope, {name: slope.weight if weight is None else weight}, SETTINGS, tmp_path, Accelerator(cpu=True))

    resumed(r"weight of shape \[1\], not \[3\]", wide)
    resumed("other weights, such as parameter/other", name="other")
    for content in (whole[:-1], whole[:20], b"", b"\xff" * 100):
        file.write_bytes(content)
        resumed("header")
    for metadata in ({"train_state": "{"}, {"train_state": '{"history": []}'}, {"train_state": "[]"}):
        save_file(tensors, file, metadata=metadata)
        resumed("")
    save_file(tensors | {"parameter/second": torch.ones(1)}, file, metadata=state)
    resumed("other weights, such as parameter/second")
