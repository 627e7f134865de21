"""Decoding with torch: a fixed set of answers, or the tokens of one as they come (paper Sec. 3.2, Eq. 4)."""

from collections.abc import Generator, Sequence

import torch

from vismem.data.sample import Sample
from vismem.generation.invocation import InvocationPolicy
from vismem.generation.loop import DecodeLoop, Request, Row
from vismem.generation.torch_executor import TorchExecutor
from vismem.generation.types import LATENT, Rollout
from vismem.models.backbones.base import Prompt
from vismem.models.vismem import VisMemModel


@torch.inference_mode()
def generate(
    model: VisMemModel,
    samples: Sequence[Sample],
    policy: InvocationPolicy,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    group_size: int = 1,
    prompt: Prompt | None = None,
) -> list[Rollout]:
    """Decode `group_size` answers per sample; rollouts come grouped by sample, in order.

    `temperature` 0 is greedy. Sampling depends on the seed, the sample's id and the member of the group, so an
    answer is the same whatever else is in the batch. In float32, that is: on a bfloat16 base it may change where the
    likeliest tokens are within 0.1 nats, since kernels add in another order for other shapes. `prompt`: the samples'
    prompts, where they are encoded already.
    """
    if not samples:
        return []
    loop = DecodeLoop(TorchExecutor(model))
    rows = loop.join(Request(samples, policy, max_new_tokens, temperature, seed, group_size, prompt))
    while loop.step():
        pass
    return [rollout_of(model, row) for row in rows]


@torch.inference_mode()
def stream(
    model: VisMemModel,
    sample: Sample,
    policy: InvocationPolicy,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    prompt: Prompt | None = None,
) -> Generator[int, None, Rollout]:
    """Yield the tokens of one answer, words and invokes, when they are decoded; returns what `generate` returns."""
    loop = DecodeLoop(TorchExecutor(model))
    (row,) = loop.join(Request([sample], policy, max_new_tokens, temperature, seed, prompt=prompt))
    while decided := loop.step():
        yield decided[0][1]
    return rollout_of(model, row)


def rollout_of(model: VisMemModel, row: Row) -> Rollout:
    """The record of a row, once it is finished."""
    tokenizer = model.backbone.processor.tokenizer
    ids, loss, logprobs = zip(*row.tokens, strict=True)
    spoken = [token for token in ids if token != LATENT and token not in model.memory_ids]
    hidden = {LATENT, *model.end_ids.values(), *model.stop_ids}
    return Rollout(
        sample_id=row.sample_id,
        token_ids=ids,
        loss_mask=loss,
        logprobs=logprobs,
        invocations=tuple(row.invocations),
        text=tokenizer.decode(spoken, skip_special_tokens=True),
        marked_text=tokenizer.decode([token for token in ids if token not in hidden]),
        finished=bool(spoken) and spoken[-1] in model.stop_ids,
        answer_length=row.answer_length,
        visual_tokens=row.prompt.visual,
    )
