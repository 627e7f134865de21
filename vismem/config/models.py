"""The base model, its memories, and when they may be invoked."""

from typing import Literal

from pydantic import Field

from vismem.config.section import Section, rare


class BaseConfig(Section):
    """The vision-language model that goes in."""

    model: str = Field(
        "embedded",
        description="hub id or path for from_pretrained; 'embedded' builds and trains a tiny one, 'small' one around "
        "SmolLM2-135M",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="weights' type")
    hidden_size: int = Field(96, description="embedded: width d of the language model")
    layers: int = Field(3, description="embedded: language model layers")
    heads: int = Field(4, description="embedded: attention heads")
    vision_width: int = Field(96, description="embedded, small: width of the vision encoder; a multiple of 32")
    vision_layers: int = Field(3, description="embedded, small: layers of the vision encoder")
    vision_steps: int = Field(250, description="embedded, small: steps that train the vision tower on scenes")
    steps: int = Field(1500, description="embedded, small: steps that train the language model")
    batch_size: int = Field(48, description="embedded, small: questions a step")
    learning_rate: float = Field(4e-3, description="embedded, small: peak rate of AdamW")
    matrix_learning_rate: float = Field(0.01, description="embedded, small: peak rate of Muon on the towers' matrices")
    language_rate: float = Field(2e-4, gt=0, description="small: peak rate of AdamW on the language model")
    interleave: float = Field(
        0.5, ge=0, le=1, description="embedded, small: share of batches that show the images again"
    )


class MemoryConfig(Section):
    """The latent memories (paper Sec. 3.3, Eq. 5-6 and 9-11)."""

    queries: int = Field(8, ge=1, description="K, memory queries [paper 4.1]")
    short_length: int = Field(8, ge=1, description="N_s, vectors of a short-term memory [paper 4.1]")
    long_length: int = Field(16, ge=1, description="N_l, vectors of a long-term memory [paper 4.1]")
    builder_layers: int = Field(2, ge=1, description="layers of the query builder [ours]")
    builder_heads: int = Field(4, ge=1, description="attention heads of the query builder [ours]")
    lora_rank: int = Field(16, ge=1, description="r [paper App.]")
    lora_alpha: float = Field(32, gt=0, description="alpha, the scale is alpha / r [paper App.]")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapters' input, where supervised [paper App.: 0.1]"
    )
    short_init: Literal["patches", "random"] = Field(
        "patches",
        description="short M_init: added to the image's pooled patches, or random as in the paper [measured]",
    )
    long_init: Literal["patches", "random"] = Field(
        "patches", description="long M_init: added to pooled image tokens, or random as in the paper [measured]"
    )
    init_std: float = rare(0.02, gt=0, description="standard deviation of random initial values [ours]")


class InvocationConfig(Section):
    """When memory may be invoked (paper Sec. 3.2, Eq. 3-4)."""

    delimiters: tuple[str, ...] = Field((",", ".", ";", ":", "\n", "?", "!"), description="delimiter set [ours]")
    init_token: str = Field("\n", description="delimiter whose embedding the four new rows are copied from [ours]")
    max_per_answer: int = Field(1, ge=0, description="max invocations per answer [measured]")
    perturbation: float = rare(0.01, ge=0, description="relative std of the new rows' perturbation [ours]")
