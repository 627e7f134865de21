"""The baselines: fine-tuning of the same base with the same data, engine, rewards and training loop as VisMem.

`sft_lora` and `grpo_lora` train a LoRA of the policy on q_proj and v_proj, the `matched` ones a LoRA with as many
parameters as VisMem's formation, the `vision` ones a LoRA on q and v of the vision encoder too. The `long` ones train
for about as many seconds as VisMem. `static_prefix` trains vectors without content, which stand where a memory is
forced at the answer's start; `continuous` trains VisMem's query builder and short former to form that memory from the
images alone. `full` trains the language model with its embeddings and head. The projector stays frozen, as in
VisMem, and but for the `vision` ones the vision encoder too, so that every arm is given the same image features.
"""

from functools import partial
from pathlib import Path

from rich.console import Console
from torch import nn

from vismem.config import Config, SupervisedConfig
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.evaluation.arms import ARMS
from vismem.generation.invocation import InvocationPolicy, Off
from vismem.generation.replay import with_memories
from vismem.generation.types import Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.loading import no_weight_bars
from vismem.models.lora import LoraSettings
from vismem.models.processors import load_processor
from vismem.models.variants import Continuous, StaticPrefix
from vismem.models.vismem import VisMemModel
from vismem.training.loop import LoopSettings
from vismem.training.rollout import GrpoObjective
from vismem.training.run import (
    FORMATION,
    POLICY_LORA,
    PREFIX,
    Inputs,
    Parameters,
    Run,
    count_of,
    new_model,
    steps_of,
    trainable,
)
from vismem.training.supervised import Written, plain_answer


def full(config: Config, inputs: Inputs, out: Path) -> str:
    """The language model, embeddings and head learn the reference answers; `out` becomes a Hugging Face folder."""
    _check_fresh("full", config, "set base.model to what it wrote")
    if config.base.tensor_parallel:
        raise UserError("full trains the base's own weights, which base.tensor_parallel divides: no process has all")
    run = Run("full", config, inputs, out, new_model)
    base = run.model.backbone
    modules = nn.ModuleDict({"language_model": base.model.model.language_model, "lm_head": base.head})
    trained = dict(modules.requires_grad_(True).named_parameters())  # weights that both share, once
    _announce(run, trained, "the whole language model")
    _train_supervised(run, trained, config.baselines.supervised.full_learning_rate)

    def save(folder: Path) -> None:
        with no_weight_bars():
            base.model.save_pretrained(folder)
        processor = load_processor(inputs["base"])
        processor.image_processor = base.processor.image_processor  # as the images were cut
        processor.save_pretrained(folder)

    return run.finish({run.name: Off()}, save)


def _check_fresh(name: str, config: Config, remedy: str) -> None:
    """UserError where a baseline without a LoRA is to start from one."""
    if config.baselines.start_from is not None:
        raise UserError(f"{name} has no LoRA to start from (baselines.start_from): {remedy}")


def _train_lora(name: str, config: Config, inputs: Inputs, out: Path) -> str:
    """Train the LoRA baseline of this name; see the module."""
    settings = config.baselines
    run = Run(name, config, inputs, out, new_model)
    if name.endswith("_matched"):
        adapter = matched_lora(run.model, settings.alpha / settings.rank, settings.dropout)
    else:
        adapter = LoraSettings(settings.rank, settings.alpha, settings.dropout, vision=name.endswith("_vision"))
    run.model.set_policy_lora(adapter)
    if settings.start_from is not None:
        run.model.load_policy_lora(settings.start_from)
    run.model.policy_lora.enabled = True
    trained = trainable(run.model, POLICY_LORA)
    layers = "all linear layers" if adapter.every_linear else "q and v"
    layers += ", the vision encoder's too" if adapter.vision else ""
    _announce(run, trained, f"LoRA of rank {adapter.rank} on {layers}")
    objective = settings.supervised if name.startswith("sft") else settings.grpo
    times = objective.longer if name.endswith("_long") else 1.0
    if isinstance(objective, SupervisedConfig):
        _train_supervised(run, trained, objective.learning_rate, times=times)
    else:
        grpo = config.grpo
        steps = steps_of(objective.steps, grpo.epochs, grpo.batch_size, len(run.samples), times)
        run.train_grpo(PolicyGrpo, objective.model_copy(update={"steps": steps}), trained)
    return run.finish({name: Off()})


sft_lora = partial(_train_lora, "sft_lora")
sft_lora_matched = partial(_train_lora, "sft_lora_matched")
sft_lora_long = partial(_train_lora, "sft_lora_long")
sft_lora_vision = partial(_train_lora, "sft_lora_vision")
grpo_lora = partial(_train_lora, "grpo_lora")
grpo_lora_matched = partial(_train_lora, "grpo_lora_matched")
grpo_lora_long = partial(_train_lora, "grpo_lora_long")
grpo_lora_vision = partial(_train_lora, "grpo_lora_vision")


def static_prefix(config: Config, inputs: Inputs, out: Path) -> str:
    """Learned vectors at the answer's start, as many as a short and a long memory together; the base is frozen."""
    _check_fresh("static_prefix", config, "set it to null")
    run = Run("static_prefix", config, inputs, out, partial(new_model, kind=StaticPrefix))
    trained = trainable(run.model, PREFIX)
    _announce(run, trained, "the vectors of a static prefix")
    _train_supervised(run, trained, config.baselines.supervised.prefix_learning_rate, answer_behind_memory)
    return run.finish({run.name: ARMS[run.name].policy})


def continuous(config: Config, inputs: Inputs, out: Path) -> str:
    """A memory formed once from the images alone, at the answer's start; the base is frozen."""
    _check_fresh("continuous", config, "set it to null")
    settings = config.baselines.supervised
    run = Run("continuous", config, inputs, out, partial(new_model, kind=Continuous))
    trained = trainable(run.model, ("builder.", "short."))
    _announce(run, trained, "query builder and short former")
    _train_supervised(run, trained, settings.learning_rate, answer_behind_memory, settings.matrix_learning_rate)
    return run.finish({run.name: ARMS[run.name].policy})


def answer_behind_memory(model: VisMemModel, sample: Sample, seed: int = 0) -> Rollout:
    """The reference answer of one sample with a memory forced at its start, short by its tokens."""
    return with_memories(model, plain_answer(model, sample), {0: MemoryKind.SHORT})


def _train_supervised(
    run: Run,
    trained: Parameters,
    learning_rate: float,
    written: Written = plain_answer,
    matrix_learning_rate: float = 0.0,
    times: float = 1.0,
) -> None:
    settings = run.config.baselines.supervised
    loop = LoopSettings(
        run.name,
        steps_of(settings.steps, settings.epochs, settings.batch_size, len(run.samples), times),
        learning_rate,
        settings.warmup_ratio,
        matrix_learning_rate,
        weight_decay=settings.weight_decay,
        checkpoint_every=run.config.grpo.checkpoint_every,
    )
    run.train_supervised(written, trained, loop, settings.batch_size, settings.micro_batch)


def _announce(run: Run, trained: Parameters, what: str) -> None:
    if run.accelerator.is_main_process:
        Console(stderr=True).print(f"{run.name}: trains {count_of(trained):,} parameters, {what}")


class PolicyGrpo(GrpoObjective):
    """GRPO of the policy's own adapter, without memory. The reference is the policy as training found it."""

    def policy(self, step: int) -> InvocationPolicy:
        """No memory."""
        return Off()


def matched_lora(model: VisMemModel, scale: float, dropout: float) -> LoraSettings:
    """The LoRA (alpha / r is `scale`) with as many parameters as VisMem's query builder and both formers, or nearly so.

    It is on q_proj and v_proj. Where their rank would exceed their width, so that a part of the parameters would be
    idle, it is on all linear layers of the language model.
    """
    wanted = count_of({name: weight for name, weight in model.named_parameters() if name.startswith(FORMATION)})
    for every_linear in (False, True):
        targets = model.backbone.language_targets(every_linear)
        sides = [(target.module.in_features, target.stop - target.start) for target in targets]
        rank = max(1, round(wanted / sum(map(sum, sides))))
        if rank <= min(map(min, sides)):
            break
    return LoraSettings(rank, scale * rank, dropout, every_linear)
