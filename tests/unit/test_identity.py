"""What a training's checkpoint belongs to: the parameters that change its result, and no other."""

from pathlib import Path
from typing import Any

import pytest

from vismem.config import Config, parse_config
from vismem.steps import identity, run_step

GRPO = ("stage1", "stage2", "grpo_lora", "full")
SMALLER: list[tuple[str, dict[str, Any]]] = [
    *((name, {"grpo": {"micro_batch": 2}}) for name in GRPO),
    *((name, {"grpo": {"gradient_checkpointing": True}}) for name in GRPO),
    ("stage1", {"grpo": {"checkpoint_every": 7}}),
    ("stage2", {"grpo": {"sample_every": 7}}),
    ("sft_lora", {"baselines": {"supervised": {"micro_batch": 2}}}),
]


@pytest.mark.parametrize(("name", "changes"), SMALLER)
def test_what_changes_no_result_leaves_a_checkpoint(name: str, changes: dict[str, Any]) -> None:
    assert identity(name, parse_config(changes), {}) == identity(name, Config(), {})


@pytest.mark.parametrize("changes", [{"batch_size": 4}, {"temperature": 0.5}, {"max_new_tokens": 7}])
@pytest.mark.parametrize("name", GRPO[:3])
def test_what_changes_the_result_does_not(name: str, changes: dict[str, Any]) -> None:
    assert identity(name, parse_config({"grpo": changes}), {}) != identity(name, Config(), {})


def test_a_training_that_had_too_little_memory_goes_on_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list[bool]()

    def train(config: Config, inputs: dict[str, Path], out: Path) -> str:
        found.append((out / "stage1.checkpoint").is_file())
        (out / "stage1.checkpoint").touch()
        raise MemoryError

    monkeypatch.setattr("vismem.training.stage1.stage1", train)
    for folder in ("base", "validate"):
        (tmp_path / folder).mkdir()
    for size in (64, 8, 8):
        with pytest.raises(MemoryError):
            run_step("stage1", parse_config({"grpo": {"micro_batch": size}}), tmp_path)
    with pytest.raises(MemoryError):
        run_step("stage1", parse_config({"grpo": {"batch_size": 4}}), tmp_path)
    assert found == [False, True, True, False]
