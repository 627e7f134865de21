"""The base model, its memories, and when they may be invoked."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from vismem.config.section import Section, rare

ROOT = Path(__file__).parents[2]  # the project: profiles, assets and the library side by side
DEFAULT_BASE = "assets/tiny-vlm"


class BaseConfig(Section):
    """The vision-language model that goes in."""

    model: str = Field(DEFAULT_BASE, description="folder or hub id for from_pretrained; the default comes with VisMem")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="weights' type")

    def folder(self) -> Path | None:
        """The model's folder, from the working folder or from the project's root; None: `model` is a hub id."""
        places = (Path(self.model), ROOT / self.model)
        return next((place for place in places if place.is_dir()), None)


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
