"""Objectives of both stages, and of the GRPO baseline, on a tiny model that invokes often."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from accelerate import Accelerator
from torch import nn

from vismem.config import GrpoConfig, GrpoStageConfig, Stage1Config, Stage2Config
from vismem.generation.replay import prefill
from vismem.models.vismem import VisMemModel
from vismem.training.baselines import PolicyGrpo
from vismem.training.rollout import GrpoObjective
from vismem.training.run import FORMATION, INVOCATION, POLICY_LORA, trainable
from vismem.training.stage1 import Formation
from vismem.training.stage2 import Invocation

GRPO = GrpoConfig(batch_size=2, max_new_tokens=8)
STAGE: dict[str, Any] = {"steps": 4, "group_size": 4, "kl_coefficient": 0.1}
STAGES: dict[str, tuple[type[GrpoObjective], GrpoStageConfig, tuple[str, ...]]] = {
    "stage1": (Formation, Stage1Config(anywhere_after=0, anywhere_share=0.6, **STAGE), FORMATION),
    "stage1 with a reader": (Formation, Stage1Config(anywhere_after=0, anywhere_share=0.6, **STAGE), FORMATION),
    "stage2": (Invocation, Stage2Config(best_words=False, **STAGE), INVOCATION),
    "stage2 with a reader": (Invocation, Stage2Config(best_words=False, **STAGE), INVOCATION),
    "stage2 with a LoRA": (Invocation, Stage2Config(policy_lora=True, **STAGE), INVOCATION + POLICY_LORA),
}
BASELINE: dict[str, tuple[type[GrpoObjective], GrpoStageConfig, tuple[str, ...]]] = {
    "grpo_lora": (PolicyGrpo, GrpoStageConfig(**STAGE), POLICY_LORA)
}


class Slope:
    """An objective of one weight whose gradient grows from step to step. `figures`: what it logs of weight and step."""

    def __init__(self, figures: Callable[[float, int], dict[str, float]]) -> None:
        self.weight, self.figures = nn.Parameter(torch.ones(1)), figures

    def collect(self, step: int) -> int:
        return step

    def backward(self, batch: int) -> dict[str, float]:
        (self.weight * (batch + 1)).sum().backward()
        return self.figures(float(self.weight.detach()), batch)


def eager_model(base: Path) -> VisMemModel:
    """A model that invokes often, and whose own adapter changes what it says."""
    model = tiny.vismem(base, tiny.MEMORY.model_copy(update={"lora_dropout": 0.1}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        last = prefill(model, tiny.samples()).last
        model.tokens.bias.fill_(float(model.backbone.head(last).logsumexp(-1).mean()) - 2.0)
        for name, parameter in model.policy_lora.named_parameters():
            if name.startswith("up."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def objective_of(stage: str, base: Path, **changes: Any) -> tuple[GrpoObjective, dict[str, nn.Parameter]]:
    """The objective of a stage, or of the baseline, and what it trains; a reader is on, and frozen.

    `changes` are of its settings or of GRPO's.
    """
    kind, config, trained = (STAGES | BASELINE)[stage]
    model = eager_model(base)
    model.policy_lora.enabled = POLICY_LORA[0] in trained or "reader" in stage
    common = {name: value for name, value in changes.items() if name in GrpoConfig.model_fields}
    own = {name: value for name, value in changes.items() if name not in common}
    grpo, config = GRPO.model_copy(update=common), config.model_copy(update=own)
    made = kind(model, tiny.samples(), grpo, config, 0, Accelerator(cpu=True))
    made.prompts_need_gradient = POLICY_LORA[0] in trained
    return made, trainable(model, trained)
