"""Models that VisMem is compared with: another memory is inserted at an answer's start, the rest is as it is."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vismem.config import InvocationConfig, MemoryConfig
from vismem.errors import UserError
from vismem.files import read_json
from vismem.models.backbones.base import Backbone, PatchStream, VisionInput
from vismem.models.kinds import MemoryKind
from vismem.models.memory import FormationInputs, root_mean_square
from vismem.models.vismem import VisMemModel


class StaticPrefix(VisMemModel):
    """Learned vectors in a memory's place, the same in every answer: as many as a short and a long memory together."""

    variant = "static_prefix"

    def __init__(self, backbone: Backbone, memory: MemoryConfig, invocation: InvocationConfig, seed: int = 0) -> None:
        super().__init__(backbone, memory, invocation, seed)
        scale = root_mean_square(backbone.embedding.weight).cpu()
        random = torch.randn(
            memory.short_length + memory.long_length, backbone.width, generator=torch.Generator().manual_seed(seed)
        )
        self.prefix = nn.Parameter((random * scale).to(backbone.device))

    def length_of(self, kind: MemoryKind) -> int:
        """N_s + N_l, whatever the kind."""
        return len(self.prefix)

    def short_stream(self, vision: VisionInput) -> PatchStream:
        """Nothing is read of the images."""
        return self.backbone.without_patches(vision)

    def form(self, kind: MemoryKind, inputs: FormationInputs) -> Tensor:
        """The learned vectors for each of R rows: (R, N_s + N_l, d)."""
        return self.prefix.to(self.backbone.embedding.weight.dtype).expand(len(inputs.sample), -1, -1)


class Continuous(VisMemModel):
    """A short memory of the images alone, as CoMEM's (arXiv 2505.17670): its queries read nothing of the question.

    Of the cognitive state H only the visual hidden states are left. Where images stand before the question, as they do
    unless it has marks for them, the causal language model computes them without it, as from the images alone.
    """

    variant = "continuous"

    def form(self, kind: MemoryKind, inputs: FormationInputs) -> Tensor:
        """Short memories (R, N_s, d) of the rows' images, wherever they are formed."""
        assert kind is MemoryKind.SHORT, "a long memory reads the question"
        counts = inputs.stream_visual.sum(1)  # of the states that H begins with
        visual = slice(int(counts.max()))
        mask = torch.arange(visual.stop, device=counts.device) < counts[:, None]
        seen = replace(
            inputs, cognitive=inputs.cognitive[:, visual], cognitive_mask=mask, segment_mask=torch.zeros_like(mask)
        )
        return super().form(kind, seen)


VARIANTS: dict[str, type[VisMemModel]] = {kind.variant: kind for kind in (VisMemModel, StaticPrefix, Continuous)}


def load_variant(folder: Path, base: Path | str, dtype: str = "float32", tensor_parallel: bool = False) -> VisMemModel:
    """`VisMemModel.from_pretrained` of whichever model was saved in `folder`. UserError for an unknown one."""
    settings = read_json(folder / "vismem.json", "give a folder that a training wrote")
    name = settings.get("variant", VisMemModel.variant) if isinstance(settings, dict) else None
    if name not in VARIANTS:
        raise UserError(f"{folder / 'vismem.json'}: unknown variant '{name}'; there are {', '.join(VARIANTS)}")
    return VARIANTS[name].from_pretrained(folder, base, dtype, tensor_parallel)
