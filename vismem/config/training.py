"""The base model, its memories, both stages of training, and the baselines."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vismem.config.section import Section, rare
from vismem.shipped import shipped

DEFAULT_BASE = "assets/tiny-vlm"
SMALL_WIDTH = 512  # hidden size below which a base trains on a CPU, with the settings of params.yaml
Init = Literal["patches", "random"]
Rate = Annotated[float, Field(gt=0, le=10)]
MatrixRate = Annotated[float, Field(ge=0, le=10)]


class BaseConfig(Section):
    """The vision-language model that goes in."""

    model: str = Field(DEFAULT_BASE, description="folder or hub id for from_pretrained; the default comes with VisMem")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="weights' type")
    tensor_parallel: bool = Field(
        False, description="all processes of a step hold the language model together, not a copy each [ours]"
    )

    def folder(self) -> Path | None:
        """The model's folder, from the working folder or of what comes with VisMem; None: `model` is a hub id."""
        places = (Path(self.model), shipped(self.model))
        return next((place for place in places if place.is_dir()), None)


class MemoryConfig(Section):
    """The latent memories (paper Sec. 3.3, Eq. 5-6 and 9-11)."""

    queries: int = Field(8, ge=1, description="K, memory queries [paper 4.1]")
    short_length: int = Field(8, ge=1, description="N_s, vectors of a short-term memory [paper]")
    long_length: int = Field(8, ge=1, description="N_l, vectors of a long-term memory [paper: 16]")
    builder_layers: int = Field(2, ge=1, description="layers of the query builder [ours]")
    builder_heads: int = Field(4, ge=1, description="attention heads of the query builder [ours]")
    lora_rank: int = Field(16, ge=1, description="r [paper App.]")
    lora_alpha: float = Field(32, gt=0, description="alpha, the scale is alpha / r [paper App.]")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="the formers', in the warm start only [paper App.: 0.1]")
    short_init: Init = Field(
        "patches", description="short M_init: added to the patches looked at, or random [paper: random]"
    )
    long_init: Init = Field(
        "patches", description="long M_init: added to pooled image tokens, or random [paper: random]"
    )
    image_pixels: int = Field(
        0, ge=0, description="max pixels of an image, shrunk where it becomes patches; 0: the processor's own [ours]"
    )
    prompt_pixels: int = Field(
        7056, ge=0, description="max pixels of an image in the prompt, short memories read it whole; 0: no max [ours]"
    )
    init_std: float = rare(0.02, gt=0, description="standard deviation of random initial values [ours]")


class InvocationConfig(Section):
    """When memory may be invoked (paper Sec. 3.2, Eq. 3-4)."""

    delimiters: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (",", ".", ";", ":", "\n", "?", "!"), description="delimiter set [ours]"
    )
    anywhere: bool = Field(False, description="the model may also call memory between delimiters [ours] [paper: true]")
    init_token: str = Field("\n", description="delimiter whose embedding the four new rows are copied from [ours]")
    max_per_answer: int = Field(8, ge=0, description="max invocations per answer [ours] [paper: no limit]")
    perturbation: float = rare(0.01, ge=0, description="relative std of the new rows' perturbation [ours]")


class GrpoConfig(Section):
    """What both stages and the baselines have in common: group relative policy optimisation (paper Sec. 3.4)."""

    epochs: int = Field(2, ge=1, description="passes over the train split, where a stage's steps is 0 [paper]")
    batch_size: int = Field(8, ge=1, description="prompts per step [paper]")
    micro_batch: int = Field(64, ge=1, description="rollouts per backward pass; changes memory, not the result")
    gradient_checkpointing: bool = Field(False, description="recompute activations; same result, less memory, slower")
    updates: int = Field(1, ge=1, description="optimiser steps per batch of rollouts [paper: 1]")
    clip_low: float = Field(0.2, gt=0, description="lower clip of the ratio; works from `updates` 2 on [paper]")
    clip_high: float = Field(0.2, gt=0, description="upper clip of the ratio; works from `updates` 2 on [paper]")
    max_new_tokens: int = Field(120, ge=1, description="longest answer in tokens, latents not counted")
    loss_type: Literal["grpo", "dr_grpo"] = Field(
        "dr_grpo", description="divides an answer's loss: its tokens (grpo) or `max_new_tokens` (dr_grpo) [paper: grpo]"
    )
    weight_decay: float = rare(0.0, ge=0, description="AdamW weight decay [ours]")
    max_grad_norm: float = rare(1.0, gt=0, description="gradient norm clip [ours]")
    normalise_by_std: bool = rare(True, description="divide advantages by the group's standard deviation [paper]")
    temperature: float = rare(1.0, gt=0, description="sampling temperature of rollouts [ours]")
    checkpoint_every: int = rare(
        50, ge=1, description="steps between checkpoints, supervised too; one is also written 10 minutes after the last"
    )
    sample_every: int = rare(10, ge=1, description="steps between logged groups of answers")

    @property
    def decode_batch(self) -> int:
        """Questions answered together where no gradient follows: four times a backward pass's rollouts, up to 32."""
        return max(self.micro_batch, min(32, 4 * self.micro_batch))

    @property
    def loss_length(self) -> int | None:
        """What the loss of every answer is divided by; None: its own number of tokens."""
        return self.max_new_tokens if self.loss_type == "dr_grpo" else None


class GrpoStageConfig(Section):
    """What each training by GRPO sets for itself; what they share is in the section `grpo`."""

    steps: int = Field(0, ge=0, description="steps; 0 means `grpo.epochs` passes over the train split")
    group_size: int = Field(16, ge=2, description="G, rollouts per prompt [paper]")
    learning_rate: Rate = Field(5e-5, description="peak rate of AdamW, cosine decay [paper]")
    warmup_ratio: float = Field(0.2, ge=0, le=1, description="share of the steps that warm up [paper]")
    kl_coefficient: float = Field(0.015, ge=0, description="beta [paper]")
    target_kl: float = Field(
        0.03, ge=0, description="KL per token that ends a batch's updates, from `grpo.updates` 2 on; 0: never [paper]"
    )


class WarmStartConfig(Section):
    """Supervised start of stage I: cross-entropy of the reference answer through the memories [ours]."""

    steps: int = Field(400, ge=0, description="steps; 0 leaves it out [paper: 0]")
    batch_size: int = Field(32, ge=1, description="questions per step")
    learning_rate: Rate = Field(1e-3, description="peak rate of AdamW")
    matrix_learning_rate: MatrixRate = Field(0.0025, description="peak rate of Muon on matrices; 0: AdamW on all")
    invoke_probability: float = Field(
        0.4,
        ge=0,
        le=1,
        description="chance of a memory at the answer's start and at a delimiter; one comes in any case [ours]",
    )
    policy_lora: bool = Field(True, description="also train LoRA on the policy's q_proj and v_proj, the reader [ours]")


class Stage1Config(GrpoStageConfig):
    """Stage I, formation: trains the query builder and both formers; memory is invoked at random."""

    steps: int = Field(20, ge=0, description="steps; 0 means `grpo.epochs` passes over the train split")
    learning_rate: Rate = Field(2e-4, description="peak rate; at this size above the paper's [paper: 5e-5]")
    invoke_probability: float = Field(0.5, ge=0, le=1, description="chance of a memory at a delimiter [ours]")
    anywhere_after: float = rare(0.5, ge=0, le=1, description="share of the steps after which any position may invoke")
    anywhere_share: float = rare(0.1, ge=0, le=1, description="chance there, relative to invoke_probability [ours]")
    warm_start: WarmStartConfig = WarmStartConfig()
    start_from: Path | None = Field(
        None, description="folder of an earlier stage1, stage2 or export to continue from; null: a fresh memory"
    )


class Stage2Config(GrpoStageConfig):
    """Stage II, invocation: trains the new tokens' rows, optionally LoRA on the policy."""

    steps: int = Field(160, ge=0, description="steps; 0 means `grpo.epochs` passes over the train split")
    group_size: int = Field(8, ge=2, description="G, rollouts per prompt [paper: 16]")
    learning_rate: Rate = Field(3e-3, description="peak rate of the new tokens' rows [paper: 1e-5]")
    whitened_learning_rate: float = Field(
        0.03,
        ge=0,
        le=10,
        description="peak rate of the invoke rows of the head, on whitened states; 0: `learning_rate` [paper: 0]",
    )
    best_words: bool = Field(
        True,
        description="without `policy_lora` rollouts draw memories alone, and take the likeliest word [paper: false]",
    )
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps that warm up [paper]")
    kl_coefficient: float = Field(0.003, ge=0, description="beta, to the policy of the stage's start [paper: 0.03]")
    target_kl: float = Field(
        0.05, ge=0, description="KL per token that ends a batch's updates, from `grpo.updates` 2 on; 0: never [paper]"
    )
    start_probability: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="chance of memory at answer start, fitted in the first stage II [paper: a delimiter's row]",
    )
    delimiter_probability: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="chance of memory at a delimiter, fitted in the first stage II [paper: a delimiter's row]",
    )
    penalty: float = Field(
        0.3, ge=0, description="alpha of p_type + p_neg; `grpo.normalise_by_std` undoes p_neg of 0/1 scores [paper]"
    )
    end_lr_scale: float = Field(0.1, ge=0, le=1, description="learning rate of the end rows, relative [ours]")
    policy_lora: bool = Field(False, description="also train LoRA on the policy's q_proj and v_proj [ours]")
    policy_learning_rate: Rate = Field(1e-3, description="peak rate of that LoRA, where it is on [paper: 1e-5]")


class SupervisedConfig(Section):
    """Supervised fine-tuning on the reference answers, from which VisMem's warm start also learns."""

    steps: int = Field(400, ge=0, description="steps; 0 means `epochs` passes over the train split")
    epochs: int = rare(2, ge=1, description="passes over the train split, where steps is 0")
    longer: float = Field(11.0, gt=0, description="sft_lora_long's steps, relative to sft_lora's [measured]")
    batch_size: int = Field(32, ge=1, description="questions per step")
    micro_batch: int = Field(64, ge=1, description="questions per backward pass; changes memory, not the result")
    learning_rate: Rate = Field(3e-3, description="peak rate of a LoRA")
    prefix_learning_rate: Rate = Field(1e-2, description="peak rate of static_prefix's vectors")
    matrix_learning_rate: MatrixRate = Field(
        0.007, description="peak rate of Muon on continuous's matrices; 0: AdamW on all"
    )
    full_learning_rate: Rate = Field(1e-3, description="peak rate of full fine-tuning")
    warmup_ratio: float = rare(0.05, ge=0, le=1, description="share of the steps that warm up")
    weight_decay: float = rare(0.0, ge=0, description="AdamW weight decay")


class BaselinesGrpoConfig(GrpoStageConfig):
    """GRPO of grpo_lora."""

    steps: int = Field(150, ge=0, description="steps; 0 means `grpo.epochs` passes over the train split")
    longer: float = Field(16.0, gt=0, description="grpo_lora_long's steps, relative to grpo_lora's [measured]")
    learning_rate: Rate = Field(1e-3, description="peak rate of AdamW, cosine decay [ours]")


class BaselinesConfig(Section):
    """What VisMem is compared with: the same base fine-tuned on the same data, `vismem sft_lora` etc. [ours]."""

    rank: int = Field(16, ge=1, description="r of sft_lora and grpo_lora, on q_proj and v_proj [paper App.]")
    alpha: float = Field(32, gt=0, description="alpha at that rank; other ranks keep the scale alpha / r [paper App.]")
    dropout: float = Field(0.0, ge=0, lt=1, description="the adapters', in sft_lora only [paper App.: 0.1]")
    start_from: Path | None = Field(
        None, description="folder of an earlier LoRA baseline to continue from; null: a fresh LoRA"
    )
    supervised: SupervisedConfig = SupervisedConfig()
    grpo: BaselinesGrpoConfig = BaselinesGrpoConfig()
