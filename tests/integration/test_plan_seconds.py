"""The seconds of a plan rest on what its steps compute: as much as the same steps do when they run, counted in FLOP."""

from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from test_plan import ASKED, LARGE, Whole, config_of
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_backward_flop, sdpa_flop

from vismem.config import Config
from vismem.plan.machine import CARDS, Machine
from vismem.plan.rehearsal import Rehearsal

aten = torch.ops.aten
register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu, get_raw=True)(sdpa_flop)
register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward, get_raw=True)(sdpa_backward_flop)


class Counting(Machine):
    """Its seconds are FLOP."""

    def seconds(self, flops: int, moved: int, kind: torch.dtype) -> float:
        return float(flops)


MACHINE = Counting(1, "H100", *CARDS["H100"])


class Counted(Whole):
    """A whole step on real tensors, whose FLOP torch counts."""

    def _train(self, objective: Any, trained: Any, settings: Any, batch_size: int) -> int:
        with FlopCounterMode(display=False) as counter:
            super()._train(objective, trained, settings, batch_size)
        self.flops = counter.get_total_flops()
        return 0


def planned_and_counted(name: str, config: Config) -> tuple[float, float]:
    planned = Rehearsal(name, config, MACHINE, ASKED).rehearse().seconds
    torch.manual_seed(0)  # how long answers are depends on the weights
    step = Counted(name, config)
    step.rehearse()
    return planned, step.flops


@pytest.fixture(scope="module", params=tiny_families.VARIANTS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.save_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_supervised_step_computes_what_is_planned(base: Path, checkpointing: bool) -> None:
    planned, counted = planned_and_counted("sft_lora", config_of(base, LARGE, gradient_checkpointing=checkpointing))
    assert planned == counted > 0


def test_a_step_of_grpo_computes_what_is_planned(base: Path) -> None:
    """Sampled, read back, and backward. An answer may end early, and the plan takes each token for the last."""
    planned, counted = planned_and_counted("grpo_lora", config_of(base, LARGE, batch_size=4))
    assert 0.9 * planned < counted <= planned


def test_so_does_a_step_that_forms_memories(base: Path) -> None:
    """One at each answer's start, most of them short; the plan has as many of both kinds."""
    config = config_of(base, LARGE | {"limit": 1}, batch_size=4)
    config = config.model_copy(update={"stage1": config.stage1.model_copy(update={"invoke_probability": 1.0})})
    planned, counted = planned_and_counted("stage1", config)
    assert 0.7 * planned < counted <= planned
