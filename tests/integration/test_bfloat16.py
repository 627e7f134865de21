"""A base in bfloat16: what is trained is float32 all the same; answers depend on their batch only at near ties."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from safetensors.torch import load_file

from vismem import steps
from vismem.config import (
    BaseConfig,
    BaselinesConfig,
    BaselinesGrpoConfig,
    Config,
    GrpoConfig,
    Stage1Config,
    Stage2Config,
    SupervisedConfig,
    WarmStartConfig,
)
from vismem.generation.engine import generate
from vismem.generation.invocation import Off
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel
from vismem.plan.machine import FLOP_SHARE, Machine
from vismem.steps import Step
from vismem.training.baselines import full, grpo_lora, sft_lora
from vismem.training.run import FORMATION, POLICY_LORA
from vismem.training.stage1 import stage1
from vismem.training.stage2 import stage2

STAGE: dict[str, Any] = {"steps": 2, "group_size": 4, "learning_rate": 1e-2}
SUPERVISED = SupervisedConfig(steps=30, batch_size=4, micro_batch=2, learning_rate=1e-2, full_learning_rate=3e-4)
CONFIG = Config(
    base=BaseConfig(dtype="bfloat16"),
    memory=tiny.MEMORY,
    grpo=GrpoConfig(batch_size=2, max_new_tokens=8),
    stage1=Stage1Config(warm_start=WarmStartConfig(steps=2, batch_size=4), **STAGE),
    stage2=Stage2Config(policy_lora=True, **STAGE),
    baselines=BaselinesConfig(rank=4, alpha=8, supervised=SUPERVISED, grpo=BaselinesGrpoConfig(**STAGE)),
)
pytestmark = pytest.mark.usefixtures("scores_differ")


@pytest.mark.parametrize("variant", ["qwen2_5_vl", "internvl", "llava_onevision"])
def test_what_vismem_adds_is_float32_and_is_trained_so(variant: str, tiny_data: Path, tmp_path: Path) -> None:
    inputs = {"base": tiny_families.save_base(tmp_path / "base", variant), "validate": tiny_data}
    for name, step, trained in (
        ("stage1", stage1, FORMATION),
        ("stage2", stage2, ("tokens.head", "tokens.bias", *POLICY_LORA)),
        ("sft_lora", sft_lora, POLICY_LORA),
        ("grpo_lora", grpo_lora, POLICY_LORA),
    ):
        inputs[name] = tmp_path / name
        inputs[name].mkdir()
        step(CONFIG, inputs, inputs[name])
        files = [inputs[name] / f"{part}.safetensors" for part in ("memory", "policy")]
        held = {key: value for file in files for key, value in load_file(file).items()}
        assert {value.dtype for value in held.values()} == {torch.float32}
        moved = [value for key, value in held.items() if key.startswith(trained) and value.any()]
        assert len(moved) > 1
        assert all((value != value.bfloat16().float()).float().mean() > 0.9 for value in moved), name


def test_full_fine_tuning_moves_the_weights_that_it_moves_in_float32(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """And as far, within bfloat16's rounding, from the same weights."""
    start = load_base(tiny_base, "bfloat16")
    start.model.save_pretrained(tmp_path / "base")
    start.processor.save_pretrained(tmp_path / "base")
    inputs, moves = {"base": tmp_path / "base", "validate": tiny_data}, []
    for dtype in ("float32", "bfloat16"):
        (tmp_path / dtype).mkdir()
        full(CONFIG.model_copy(update={"base": BaseConfig(dtype=dtype)}), inputs, tmp_path / dtype)  # type: ignore[arg-type]
        before, after = start.model.state_dict(), load_base(tmp_path / dtype, "bfloat16").model.state_dict()
        moves.append(torch.cat([(after[key].float() - value.float()).flatten() for key, value in before.items()]))
    twin, found = moves
    assert (twin != 0).float().mean() > 0.3
    assert (found[twin != 0] != 0).float().mean() > 0.99
    assert (found - twin).norm() < 0.2 * twin.norm()


def test_an_answer_is_another_in_a_batch_only_from_a_near_tie_on(tiny_base: Path) -> None:
    samples = tiny.samples(24)
    model = VisMemModel(load_base(tiny_base, "bfloat16"), tiny.MEMORY, CONFIG.invocation)
    together = generate(model, samples, Off(), max_new_tokens=12)
    assert together == generate(model, samples, Off(), max_new_tokens=12)
    for sample, ours in zip(samples, together, strict=True):
        alone = generate(model, [sample], Off(), max_new_tokens=12)[0]
        for step, pair in enumerate(zip(alone.logprobs, ours.logprobs, strict=False)):
            assert pair[0] == pytest.approx(pair[1], abs=0.1), "of the likeliest tokens, be they the same or not"
            if alone.token_ids[step] != ours.token_ids[step]:
                break


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def using(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    load_base(config.base.model, config.base.dtype)
    return str(tf32())


def test_float32_beside_it_is_computed_as_tf32_on_a_gpu_and_beside_a_float32_base_is_not(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps that train and evaluate; what a user has set for a process of their own stays."""
    monkeypatch.setattr(
        steps, "BY_NAME", {name: Step(name, f"{__name__}:using", (), ()) for name in ("full", "export")}
    )
    before, h100 = tf32(), Machine.named("1xH100")
    for dtype, allowed, rate in (("bfloat16", True, h100.bfloat16 / 2), ("float32", False, h100.float32)):
        config = Config(base=BaseConfig(model=str(tiny_base), dtype=dtype))
        assert steps.run_step("full", config, tmp_path) == str((allowed, allowed))
        assert steps.run_step("export", config, tmp_path) == str(before)
        assert tf32() == before
        assert h100.beside(dtype).seconds(10**15, 0, torch.float32) == 10**15 / (FLOP_SHARE * rate), "so it is planned"
