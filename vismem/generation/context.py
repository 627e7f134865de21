"""Prefilled prompts, and the memories that are formed on them, in decoding and in replay alike (paper Sec. 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from vismem.data.sample import Sample
from vismem.models.attention import Attention, Look
from vismem.models.backbones.base import PatchStream, Prompt
from vismem.models.kinds import MemoryKind
from vismem.models.memory import FormationInputs, causal_mask
from vismem.models.vismem import VisMemModel


@dataclass
class Context:
    """S prefilled prompts with their cache, and what memories read of them, computed when the first one is formed."""

    model: VisMemModel
    prompt: Prompt
    visual: Tensor  # (S, V, d) v_1..v_y of H: the hidden states at image and video tokens, packed to the left
    visual_mask: Tensor  # (S, V)
    last: Tensor  # (S, d) the hidden state of each prompt's last token
    cache: Any
    samples: Sequence[Sample] = ()  # whose prompts they are, where they were encoded here
    patches: PatchStream | None = None  # inside the short former
    prefix: DynamicCache | None = None  # inside the long former
    looks: list[Look] | None = None  # where there is one, every memory's is appended to it

    @classmethod
    def read(cls, model: VisMemModel, prompt: Prompt, cache: Any) -> "Context":
        """Run the prompts through the language model."""
        hidden = model.backbone.language(prompt.embeds, prompt.positions, causal_mask(prompt.mask), cache)
        order = prompt.visual.int().argsort(dim=1, descending=True, stable=True)
        order = order[:, : int(prompt.visual.sum(1).max())]
        visual = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
        last = hidden[torch.arange(len(hidden), device=hidden.device), prompt.mask.sum(1) - 1]
        return cls(model, prompt, visual, prompt.visual.gather(1, order), last, cache)

    def form(
        self, kind: MemoryKind, sample: Tensor, segment: tuple[Tensor, Tensor], stream: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Memories (R, N, d) of rows at their invoke tokens, `sample` (R,) their prompts.

        `segment`: hidden states of the current segment (R, T, d) and their mask (R, T), right-padded. `stream`:
        embeddings so far (R, X, d), their positions (3, R, X) and mask (R, X).
        """
        if kind is MemoryKind.SHORT and self.patches is None:
            self.patches = self.model.short_stream(self.prompt.vision)
        if kind is MemoryKind.LONG and self.prefix is None:
            self.prefix = self.model.long_prefix(self.prompt)
        (states, states_mask), (embeds, positions, mask) = segment, stream
        inputs = FormationInputs(
            sample=sample,
            cognitive=torch.cat([self.visual[sample], states], dim=1),
            cognitive_mask=torch.cat([self.visual_mask[sample], states_mask], dim=1),
            segment_mask=pad(states_mask, (self.visual.shape[1], 0)),
            stream=embeds,
            positions=positions,
            stream_mask=mask,
            stream_visual=pad(self.prompt.visual[sample], (0, mask.shape[1] - self.prompt.visual.shape[1])),
            patches=self.patches,
            prefix=self.prefix,
        )
        if self.looks is None:
            return self.model.form(kind, inputs)
        with Attention() as attention:
            memory = self.model.form(kind, inputs)
        self.looks += attention.looks(kind, inputs, self.model.slots_of(kind), self.model.backbone.processes)
        return memory
