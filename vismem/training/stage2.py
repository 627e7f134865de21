"""The step `stage2`: memory invocation. Formation is frozen; the new tokens' rows learn when to invoke which.

Paper Sec. 3.4, Eq. 13-15. How the rows are initialised is a choice of ours: the invoke tokens' rows in the head are
fitted so that memory has a chosen chance at the answer's start and another after delimiters, and hardly any elsewhere;
GRPO moves them from there. Rows that an earlier stage II has left are kept as they are.
"""

import math
import shutil
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import torch
from accelerate.utils import broadcast, gather_object
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.checkpoint import checkpoint

from vismem.config import Config, GrpoConfig, Stage2Config
from vismem.data.sample import Sample
from vismem.generation.invocation import InvocationPolicy, Learned, Off, Random, Replay, row_key
from vismem.generation.replay import answer_states, decisions_of, prefill
from vismem.generation.token_scores import together
from vismem.generation.types import LATENT, Rollout
from vismem.models.loading import read_weights
from vismem.models.vismem import VisMemModel
from vismem.records import VANILLA, VISMEM
from vismem.training.checkpoint import save_whole
from vismem.training.grpo import negative_penalty, type_penalty
from vismem.training.rewards import rewards_of
from vismem.training.rollout import GrpoObjective
from vismem.training.run import AFTER, BEFORE, INVOCATION, POLICY_LORA, Inputs, Run, refuse_wide, trainable
from vismem.training.whitening import Whitening, whitened

ELSEWHERE = 0.004  # chance of a memory between delimiters, before training
SAMPLED = "vismem_sampled"  # the check in which the policy samples, as in training
FIT_BATCH = 32  # questions that are answered together for the fit, at most
ANSWERED = Random(probability=0.3)  # who decides about memories in these answers
START, DELIMITER, BETWEEN = range(3)  # sorts of places in an answer
SPACE, WHITENED = ("map", "back"), ("tokens.parametrizations.head", "tokens.bias")  # a Whitening's, what trains in it


class Invocation(GrpoObjective):
    """GRPO of the invoke tokens: the score less alpha * (p_type + p_neg)."""

    stage: Stage2Config

    def policy(self, step: int) -> InvocationPolicy:
        """The model decides."""
        return Learned(best_words=self.best_words)

    @property
    def best_words(self) -> bool:
        """Whether words are not drawn; they are where the policy's LoRA, which decides about them, is trained."""
        return self.stage.best_words and not self.stage.policy_lora

    def shaped(self, rewards: Tensor, batch: Sequence[Sample], rollouts: Sequence[Rollout], step: int) -> Tensor:
        """S - alpha * (p_type + p_neg); tau_rev is decoded from the same seed with every kind swapped (Eq. 13-15).

        Not for prompts that got right answers alone: no reverse scores higher.
        """
        group, swapped = self.stage.group_size, rewards.clone()
        invoked = torch.tensor([bool(rollout.invocations) for rollout in rollouts]).view_as(rewards)
        asked = (invoked & (rewards < 1)).any(dim=1)
        if asked.any() and self.stage.penalty > 0:
            recorded = {
                row_key(rollout.sample_id, index % group): decisions_of(self.model, rollout)
                for index, rollout in enumerate(rollouts)
            }
            again = list(compress(batch, asked.tolist()))
            reverse = Replay(recorded=recorded, swap=True, best_words=self.best_words)
            scores = rewards_of(again, self.sample(again, reverse, step))
            swapped[asked] = torch.where(invoked[asked], scores, rewards[asked])
        return rewards - self.stage.penalty * (type_penalty(rewards, swapped) + negative_penalty(rewards))


def stage2(config: Config, inputs: Inputs, out: Path) -> str:
    """Train when to invoke which memory; writes the complete model, both stages' curves and metrics to `out`."""
    settings = config.stage2
    stage1, base = inputs["stage1"], config.base

    def trained_before(*_: object) -> VisMemModel:
        return VisMemModel.from_pretrained(stage1, inputs["base"], base.dtype, base.tensor_parallel)

    run = Run("stage2", config, inputs, out, trained_before)
    if (rate := settings.whitened_learning_rate) >= Stage2Config().whitened_learning_rate:
        refuse_wide(run.model, "stage2.whitened_learning_rate", rate, "it moves a wide base's rows too far")
    whitening = _begin(run, config, out / "fitted.checkpoint")
    run.model.policy_lora.enabled |= settings.policy_lora  # one that stage I trained stays on
    run.check(BEFORE, VISMEM, Learned())
    run.check(BEFORE, SAMPLED, Learned(), temperature=config.grpo.temperature)
    with whitened(run.model.tokens, whitening):
        trained = trainable(run.model, INVOCATION + (POLICY_LORA if settings.policy_lora else ()))
        rates = dict.fromkeys((n for n in trained if n.startswith(POLICY_LORA)), settings.policy_learning_rate)
        if whitening:
            rates |= {name: settings.whitened_learning_rate for name in trained if name.startswith(WHITENED)}
        rates["tokens.end"] = settings.end_lr_scale * settings.learning_rate
        run.train_grpo(Invocation, settings, trained, rates)
    for curve in stage1.glob("*.csv"):
        shutil.copy(curve, out)
    run.check(AFTER, SAMPLED, Learned(), temperature=config.grpo.temperature)
    random = {f"random_{percent}": Random(probability=percent / 100) for percent in (25, 50, 100)}
    return run.finish({VANILLA: Off(base=True), VISMEM: Learned(), **random})


def _begin(run: Run, config: Config, kept: Path) -> Whitening | None:
    """Give the rows the chances that GRPO begins with; returns the space that it trains them in, if any.

    Both are in the file `kept`: they are the same for a run that is resumed, perhaps on another GPU.
    """
    tokens, stage, space = run.model.tokens, config.stage2, dict[str, Tensor]()
    if all(gather_object([kept.is_file()])):
        weights = read_weights(kept)
        space = {name: weights.pop(name).to(tokens.head.device) for name in SPACE if name in weights}
        tokens.load_state_dict(weights)
    elif stage.whitened_learning_rate or not tokens.fitted:
        answers = run.answer(run.fitted, ANSWERED, "initial chances", fit_batch(config.grpo), config.grpo.temperature)
        states, places = decisions(run.model, run.fitted, answers, fit_batch(config.grpo))
        if not tokens.fitted:
            fit_invocation(run.model, states, places, stage, config.grpo.temperature)
        if stage.whitened_learning_rate:
            decided = states if config.invocation.anywhere else states[places != BETWEEN]
            space = Whitening.of(decided).state_dict()
    weights = dict(tokens.state_dict()) | space
    for weight in weights.values():  # other processes' sums may differ in the last digits
        broadcast(weight, from_process=0)
    if run.accelerator.is_main_process and kept.parent.is_dir() and not kept.is_file():  # a plan has no folder
        save_whole(weights, kept)
    return Whitening(**space) if space else None


def fit_batch(grpo: GrpoConfig) -> int:
    """Questions that are answered together for the fit."""
    return min(FIT_BATCH, grpo.decode_batch)


def fit_invocation(model: VisMemModel, states: Tensor, places: Tensor, stage: Stage2Config, temperature: float) -> None:
    """Set the head's invoke rows so that memory has a chosen chance (logistic regression of that chance).

    `stage.start_probability` holds at the answer's start, `stage.delimiter_probability` after delimiters; each is
    divided equally between the two kinds. It is fitted on the `decisions` of answers that are as rollouts are, drawn at
    the same temperature.
    """
    wanted = [stage.start_probability, stage.delimiter_probability, ELSEWHERE]
    pieces = torch.split(states, min(512, together(model.vocabulary)))
    others = torch.cat([(model.backbone.head(piece).double() / temperature).logsumexp(-1) for piece in pieces])
    features = torch.split(states, together(states.shape[1]))
    target = torch.tensor(wanted, dtype=torch.double, device=states.device)[places]
    weight = 1 / places.bincount(minlength=3).double()[places] / 3  # all sorts of places weigh the same
    row = torch.zeros(states.shape[1], dtype=torch.double, device=states.device, requires_grad=True)
    bias = others.mean().detach().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([row, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        products = [checkpoint(_product, piece, row, use_reentrant=False) for piece in features]
        odds = torch.cat(products) + bias + math.log(2) - others
        loss = binary_cross_entropy_with_logits(odds, target, weight, reduction="sum") + 1e-4 * row.pow(2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.tokens.head.copy_((row * temperature).expand_as(model.tokens.head))
        model.tokens.bias.fill_(float(bias) * temperature)


def _product(states: Tensor, row: Tensor) -> Tensor:
    """(n,) in double precision, to which not all states of a large model could be copied at once."""
    return states.double() @ row


@torch.no_grad()
def decisions(
    model: VisMemModel, samples: Sequence[Sample], answers: Sequence[Rollout], batch_size: int
) -> tuple[Tensor, Tensor]:
    """(n, d) hidden states from which sampled answers were decided, and (n,) where: START, DELIMITER or BETWEEN."""
    states, places = [], []
    for at in range(0, len(samples), batch_size):
        batch, rollouts = samples[at : at + batch_size], answers[at : at + batch_size]
        sample = torch.arange(len(batch), device=model.backbone.device)
        hidden = answer_states(model, prefill(model, batch), rollouts, sample)
        for row, rollout in enumerate(rollouts):
            tokens, skipped = rollout.token_ids, {LATENT, *model.end_ids.values()}
            decided = [index for index, token in enumerate(tokens) if token not in skipped]
            states.append(hidden[row, decided])
            for index in decided:
                delimiter = index > 0 and tokens[index - 1] in model.delimiter_ids
                places.append((DELIMITER if delimiter else BETWEEN) if index else START)
        del hidden  # before the next batch is read
    return torch.cat(states), torch.tensor(places, device=model.backbone.device)
