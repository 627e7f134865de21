"""The step `stage2`: memory invocation. Formation is frozen; the new tokens' rows learn when to invoke which.

Paper Sec. 3.4, Eq. 13-15. Where the first invocations come from is a choice of ours: the invoke tokens' rows in the
head are fitted so that memory has a chosen chance at the answer's start and another after delimiters, and hardly any
elsewhere; from there GRPO moves them.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from vismem.config import Config, Stage2Config
from vismem.data.sample import Sample, read_samples
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Learned, Off, Random, Replay, row_key
from vismem.generation.replay import answer_states, decisions_of, read_prompts
from vismem.generation.types import LATENT, Rollout
from vismem.models.vismem import VisMemModel
from vismem.training.grpo import negative_penalty, type_penalty
from vismem.training.loop import train
from vismem.training.rewards import rewards_of
from vismem.training.rollout import GrpoObjective
from vismem.training.stage1 import cost, describe, finish, loop_settings, phase, trainable, training_samples

INVOCATION = ("tokens.",)
POLICY_LORA = ("policy_lora.",)
FITTED = 256  # train questions whose answers the head's rows are fitted on
ELSEWHERE = 0.004  # chance of a memory between delimiters, before training


class Invocation(GrpoObjective):
    """GRPO of the invoke tokens: the score less alpha * (p_type + p_neg)."""

    config: Stage2Config

    def policy(self, step: int) -> InvocationPolicy:
        """The model decides."""
        return Learned()

    def shaped(self, rewards: Tensor, batch: Sequence[Sample], rollouts: Sequence[Rollout], step: int) -> Tensor:
        """S - alpha * (p_type + p_neg); tau_rev is decoded with the same draws and every kind swapped (Eq. 13-15)."""
        group = self.config.group_size
        recorded = {
            row_key(rollout.sample_id, index % group): decisions_of(self.model, rollout)
            for index, rollout in enumerate(rollouts)
        }
        swapped = rewards
        if any(recorded.values()) and self.config.penalty > 0:
            reversed_rollouts = generate(
                self.model,
                batch,
                Replay(recorded=recorded, swap=True),
                max_new_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                seed=self.seed * 1_000_003 + step,
                group_size=group,
            )
            invoked = torch.tensor([bool(r.invocations) for r in rollouts]).view_as(rewards)
            swapped = torch.where(invoked, rewards_of(batch, reversed_rollouts), rewards)
        return rewards - self.config.penalty * (type_penalty(rewards, swapped) + negative_penalty(rewards))


def stage2(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Train when to invoke which memory; writes the complete model, both stages' curves and metrics to `out`."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(config.seed)
    settings = config.stage2
    model = VisMemModel.from_pretrained(inputs["stage1"], inputs["base"], config.base.dtype)
    model.backbone.model.to(accelerator.device)
    model.to(accelerator.device)
    data = inputs["validate"] / "data"
    samples, validation = training_samples(data / "train"), read_samples(data / "validation")
    fit_invocation(model, samples[:FITTED], settings, config.seed)
    model.policy_lora.enabled = settings.policy_lora
    trained = trainable(model, INVOCATION + (POLICY_LORA if settings.policy_lora else ()))
    objective = Invocation(model, samples, settings, config.seed, accelerator, out)
    objective.prompts_need_gradient = settings.policy_lora
    history = train(
        objective,
        trained,
        loop_settings("stage2", settings, len(samples)),
        out,
        accelerator,
        rates={"tokens.end": settings.end_rate},
    )
    arms = {"vanilla": Off(), "vismem": Learned(), "random_50": Random(probability=0.5)}
    for curve in inputs["stage1"].glob("*.csv"):
        shutil.copy(curve, out)
    spent = cost(trained, len(samples), phase(history, settings))
    metrics = finish(model, validation, arms, settings, config.seed, history, out, accelerator, spent)
    return f"stage2: {len(history)} GRPO steps; validation {describe(metrics)}"


def fit_invocation(model: VisMemModel, samples: Sequence[Sample], config: Stage2Config, seed: int) -> None:
    """Set the head's invoke rows so that memory starts with a chosen chance (logistic regression of that chance).

    `config.start_probability` holds at the answer's start, `config.delimiter_probability` after delimiters; the two
    kinds share them equally.
    """
    states, wanted = _decisions(model, samples, config, seed)
    others = torch.cat([model.backbone.head(part).double().logsumexp(-1) for part in torch.split(states, 512)])
    features, target = states.double(), torch.tensor(wanted, dtype=torch.double, device=states.device)
    _, sort, counts = torch.unique(target, return_inverse=True, return_counts=True)
    weight = 1 / counts[sort] / len(counts)  # every sort of place counts the same
    row = torch.zeros(features.shape[1], dtype=torch.double, device=states.device, requires_grad=True)
    bias = others.mean().detach().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([row, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        odds = features @ row + bias + math.log(2) - others
        loss = binary_cross_entropy_with_logits(odds, target, weight, reduction="sum") + 1e-4 * row.pow(2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.tokens.head.copy_(row.expand_as(model.tokens.head))
        model.tokens.bias.fill_(float(bias))


@torch.no_grad()
def _decisions(
    model: VisMemModel, samples: Sequence[Sample], config: Stage2Config, seed: int
) -> tuple[Tensor, list[float]]:
    """(n, d) hidden states from which sampled answers were decided, and the chance of a memory wanted at each."""
    states, wanted = [], []
    for at in range(0, len(samples), 32):
        batch = samples[at : at + 32]
        rollouts = generate(
            model, batch, Random(probability=0.3), max_new_tokens=config.max_new_tokens, temperature=1.0, seed=seed
        )
        sample = torch.arange(len(batch), device=model.backbone.device)
        hidden = answer_states(model, read_prompts(model, batch), rollouts, sample)
        for row, rollout in enumerate(rollouts):
            for index, token in enumerate(rollout.token_ids):
                before = rollout.token_ids[index - 1] if index else None
                if token == LATENT or token in model.end_ids.values():
                    continue
                states.append(hidden[row, index])
                delimiter = before in model.delimiter_ids
                between = config.delimiter_probability if delimiter else ELSEWHERE
                wanted.append(config.start_probability if before is None else between)
    return torch.stack(states), wanted
