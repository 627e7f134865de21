"""A saved model as transformers loads it: `AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)`.

Its `generate` takes what the base's processor makes of chats and images and returns token ids, as any model's does.
Memories are invoked on the way; of them only the invoke and end tokens stand in the ids, which are special tokens.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel

from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.generation.engine import generate
from vismem.generation.types import LATENT
from vismem.inference import Memory, VisMem, policy_of


class VisMemConfig(PretrainedConfig):  # type: ignore[misc]
    """Names the code; the model's settings are in vismem.json."""

    model_type = "vismem"


class VisMemForAnswers(PreTrainedModel):  # type: ignore[misc]
    """See the module. `model.vismem` is the `VisMem`, `model.processor` its base's processor. No `forward`."""

    config_class = VisMemConfig

    def __init__(self, config: VisMemConfig, vismem: VisMem) -> None:
        super().__init__(config)
        self.vismem, self.processor = vismem, vismem.model.backbone.processor
        self.base, self.added = vismem.model.backbone.model, vismem.model

    @classmethod
    def from_pretrained(cls, name: str | Path, *_: Any, config: VisMemConfig, **options: Any) -> "VisMemForAnswers":
        """As `VisMem.from_pretrained`; of transformers' options only `dtype` counts, bfloat16 or float32."""
        named: Any = str(options.get("dtype")).removeprefix("torch.")
        return cls(config, VisMem.from_pretrained(name, "cpu", named if named in ("bfloat16", "float32") else None))

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        *,
        mm_token_type_ids: Tensor | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int = 0,
        memory: Memory = True,
    ) -> Tensor:
        """(B, L + T): the prompts (B, L), each followed by its answer and padding; see `VisMem.answer`.

        The ids are taken as they are: whoever makes them keeps users' text from holding the model's own tokens, as
        `VisMem.answer` does. UserError for a memory token among them, and where image tokens and images do not match.
        """
        backbone, longest = self.added.backbone, self.added.new_tokens if max_new_tokens is None else max_new_tokens
        if longest < 1:
            raise UserError(f"max_new_tokens is {longest}: it must be at least 1")
        if torch.isin(input_ids, torch.tensor(self.added.memory_ids, device=input_ids.device)).any():
            raise UserError(
                "input_ids hold a memory token, which only the model itself writes: take it out of the text"
            )
        prompt = backbone.prompt_of(input_ids, attention_mask, pixel_values, image_grid_thw)
        rollouts = generate(
            self.added,
            [Sample("", (), "", "")] * len(input_ids),
            policy_of(memory),
            max_new_tokens=longest,
            temperature=temperature if do_sample else 0.0,
            seed=seed,
            prompt=prompt,
        )
        answers = [torch.tensor([token for token in rollout.token_ids if token != LATENT]) for rollout in rollouts]
        padded = pad_sequence(answers, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id)
        return torch.cat([input_ids, padded.to(input_ids.device)], dim=1)
