"""The steps, each as the phases of its own code that hold most. Every figure is of one GPU."""

import torch
from torch import nn

from vismem.config import Config
from vismem.evaluation.arms import resolve_arms
from vismem.generation.invocation import Learned, Off, Random
from vismem.generation.replay import answer_states, prefill
from vismem.models.variants import Continuous, StaticPrefix
from vismem.plan.model import answers, questions
from vismem.plan.rehearsal import ADDED, Rehearsal, StepPlan
from vismem.training.baselines import PolicyGrpo, lora_settings
from vismem.training.run import FORMATION, INVOCATION, POLICY_LORA, PREFIX, trainable
from vismem.training.stage1 import Formation
from vismem.training.stage2 import FITTED, Invocation

FITTING = "fit head"


def rehearse(stage: Rehearsal) -> StepPlan:
    """Run the phases of a stage, of `evaluate` or of a baseline."""
    with stage.shapes:
        {"stage1": _stage1, "stage2": _stage2, "evaluate": _evaluate}.get(stage.plan.name, _baseline)(
            stage, stage.config
        )
    return stage.plan


def _stage1(stage: Rehearsal, config: Config) -> None:
    model, warm = stage.model(), config.stage1.warm_start
    if warm.steps:
        model.policy_lora.enabled = warm.policy_lora
        trained = trainable(model, FORMATION + POLICY_LORA * warm.policy_lora)
        together, memories = (warm.batch_size, config.grpo.micro_batch), config.invocation.max_per_answer
        stage.supervised("warm", model, trained, together, memories, warm.matrix_learning_rate)
    stage.grpo(model, Formation, config.stage1, trainable(model, FORMATION))
    stage.decode("check", model, Random(probability=1.0), config.grpo.max_new_tokens, config.grpo.micro_batch)


def _stage2(stage: Rehearsal, config: Config) -> None:
    model, tokens, together = stage.model(), config.grpo.max_new_tokens, config.grpo.micro_batch
    if stage.wanted(FITTING):
        with stage.phase(FITTING), torch.no_grad():  # as `fit_invocation`
            samples = questions(32, stage.image)
            rollouts = answers(model, samples, 1, tokens, model.limit(None))
            states = answer_states(model, prefill(model, samples), rollouts, torch.arange(32))
            states = torch.zeros(FITTED * states.shape[1], states.shape[2], dtype=states.dtype)
            kept = states.clone(), states.double()
            del states, kept
    model.policy_lora.enabled = config.stage2.policy_lora
    trained = trainable(model, INVOCATION + POLICY_LORA * config.stage2.policy_lora)
    stage.grpo(model, Invocation, config.stage2, trained)
    stage.decode("check", model, Learned(), tokens, together)


def _evaluate(stage: Rehearsal, config: Config) -> None:
    arms, rows = resolve_arms(config.evaluate.arms), config.evaluate.batch_size
    models = [stage.model() for _ in {arm.model for arm in arms}]  # all are loaded at once
    stage.plan.rows, tokens = rows, config.evaluate.max_new_tokens
    for arm in {type(arm.policy): arm for arm in reversed(arms)}.values():
        seconds = stage.decode(arm.label, models[-1], arm.policy, tokens, rows)
        stage.plan.seconds = max(stage.plan.seconds, seconds)


def _baseline(stage: Rehearsal, config: Config) -> None:
    name, settings = stage.plan.name, config.baselines
    supervised = settings.supervised
    sizes = supervised.batch_size, supervised.micro_batch
    if name == "full":
        model = stage.model()
        base = model.backbone
        modules = nn.ModuleDict({"language_model": base.model.model.language_model, "lm_head": base.head})
        stage.supervised("answers", model, dict(modules.requires_grad_(True).named_parameters()), sizes)
    elif name in ("static_prefix", "continuous"):
        model = stage.model(StaticPrefix if name == "static_prefix" else Continuous)
        trained = trainable(model, PREFIX if name == "static_prefix" else ("builder.", "short."))
        stage.supervised("answers", model, trained, sizes, 1, supervised.matrix_learning_rate * (name == "continuous"))
    else:
        model = stage.model()
        with stage.shapes.part(ADDED):
            model.set_policy_lora(lora_settings(name, model, settings))
        model.policy_lora.enabled = True
        trained = trainable(model, POLICY_LORA)
        if name.startswith("grpo"):
            stage.grpo(model, PolicyGrpo, settings.grpo, trained)
        else:
            stage.supervised("answers", model, trained, sizes)
    stage.decode("check", model, Off(), config.grpo.max_new_tokens, config.grpo.micro_batch)
