"""What a decoded answer is: `Rollout`, shared by evaluation, GRPO and export (paper Sec. 3.2)."""

from dataclasses import dataclass

from vismem.models.kinds import MemoryKind

LATENT = -1  # stands in `Rollout.token_ids` where a latent memory vector was inserted


@dataclass(frozen=True)
class Invocation:
    """One memory invocation of a row. `position` is the invoke token's index in `Rollout.token_ids`."""

    position: int
    kind: MemoryKind
    forced: bool  # by a policy such as random, rather than sampled by the model


@dataclass(frozen=True)
class Rollout:
    """One answer. The three sequences have the same length T: sampled tokens, latents and appended end tokens."""

    sample_id: str
    token_ids: tuple[int, ...]  # LATENT where a memory vector stands
    loss_mask: tuple[bool, ...]  # False on latents, appended end tokens and forced invocations
    logprobs: tuple[float, ...]  # of sampled tokens under the sampling distribution; 0.0 elsewhere
    invocations: tuple[Invocation, ...]
    text: str  # decoded answer, special tokens left out
    marked_text: str  # decoded answer with <m_I^s>, <m_I^l> left in where memories were invoked
    finished: bool  # ended with the end-of-answer token rather than at the length limit
    answer_length: int  # sampled tokens, latents, markers and end tokens not counted
    visual_tokens: int = 0  # of the images and videos before the answer; 0 where it was not decoded
