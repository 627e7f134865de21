"""What `vismem plan` makes of batches: how long they take, and how small they may become."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from vismem.cli import main
from vismem.config import load_config, parse_config
from vismem.plan.machine import Machine
from vismem.plan.model import Questions
from vismem.plan.rehearsal import Rehearsal


class WithoutDecoding(Rehearsal):
    def _decode(self, *_: Any, **__: Any) -> float:
        return 0.0


def seconds(kind: type[Rehearsal], name: str, base: Path, **changes: Any) -> float:
    sections = {
        "base": {"model": str(base)},
        "memory": tiny.MEMORY.model_dump(),
        "stage1": {"warm_start": {"steps": 0}},
        **changes,
    }
    return kind(name, parse_config(sections), Machine.named("1xH100"), Questions((84, 84))).rehearse().seconds


@pytest.mark.parametrize("name", ["sft_lora", "grpo_lora"])
def test_a_step_s_backward_pass_takes_as_many_times_as_long_as_it_has_micro_batches(tiny_base: Path, name: str) -> None:
    def backward(questions: int) -> float:
        supervised = {"batch_size": questions, "micro_batch": 4}
        baselines = {"supervised": supervised, "grpo": {"group_size": 2}}
        grpo = {"batch_size": questions, "micro_batch": 8, "max_new_tokens": 12}
        return seconds(WithoutDecoding, name, tiny_base, baselines=baselines, grpo=grpo)

    one, two, three = (backward(4 * micro_batches) for micro_batches in (1, 2, 3))
    assert two - one == pytest.approx(three - two)
    assert two > 1.5 * one


def test_memories_take_as_long_whether_many_rows_form_them_at_once_or_few(tiny_base: Path) -> None:
    """Every answer has as many as its limit; together they are formed a little faster."""
    grpo = {"batch_size": 8, "max_new_tokens": 4}
    took = {
        chance: seconds(
            Rehearsal, "stage1", tiny_base, grpo=grpo, stage1={"invoke_probability": chance, "warm_start": {"steps": 0}}
        )
        for chance in (0.25, 1.0)
    }
    assert took[1.0] < took[0.25] < 2 * took[1.0]


def test_stage_two_samples_twice_where_it_asks_whether_the_other_kind_would_have_done_better(tiny_base: Path) -> None:
    def took(kind: type[Rehearsal], penalty: float) -> float:
        grpo = {"batch_size": 4, "max_new_tokens": 12}
        return seconds(kind, "stage2", tiny_base, grpo=grpo, stage2={"penalty": penalty, "steps": 1})

    without = took(WithoutDecoding, 0.0)
    assert took(WithoutDecoding, 0.3) == without
    assert took(Rehearsal, 0.3) - without == pytest.approx(2 * (took(Rehearsal, 0.0) - without))


def test_a_batch_is_halved_to_a_question_for_each_gpu_and_no_further(
    tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else is as small as it can be."""
    settings = {
        "base.model": str(tiny_base),
        "stage1.warm_start.steps": 0,
        "stage1.group_size": 32,
        "grpo.micro_batch": 1,
        "grpo.gradient_checkpointing": True,
    }
    least = load_config(Path("params.yaml"), "smoke", {**settings, "grpo.batch_size": 2})
    needed = Rehearsal("stage1", least, Machine.named("2xH100"), Questions((84, 84))).rehearse().bytes
    given = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    for usable, said in ((needed, "--set grpo.batch_size=2"), (needed - 1, "it fits no card known here")):
        monkeypatch.setattr(Machine, "usable", usable)
        command = ["plan", "--params", "params.yaml", "--profile", "smoke", *given, "--image", "84x84"]
        assert main([*command, "--gpus", "2xH100", "stage1"]) == 1
        assert said in capsys.readouterr().err
