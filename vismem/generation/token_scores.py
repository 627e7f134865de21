"""Log-probabilities and entropy of recorded tokens, without ever holding the logits of many tokens."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vismem.models.vismem import VisMemModel

MAX_LOGITS = 2**26  # held at a time


def together(vocabulary: int) -> int:
    """How many tokens may have their logits over a vocabulary at a time: as many as have MAX_LOGITS, but one."""
    return max(1, MAX_LOGITS // vocabulary)


def token_scores(
    model: VisMemModel,
    hidden: Tensor,
    columns: Tensor,
    barred: Tensor,
    temperature: float,
    best_words: bool = False,
) -> tuple[Tensor, Tensor]:
    """For n tokens, each (n,): log-probability and entropy.

    `hidden` (n, d), `columns` (n,), `barred` (n, 2) which invoke tokens may not follow; with `best_words` all words are
    one, since only the likeliest may follow. Many tokens of a large
    vocabulary go through the head piece by piece, and again in the backward pass, so that their logits are never held.
    """

    def piece(hidden: Tensor, columns: Tensor, barred: Tensor) -> tuple[Tensor, Tensor]:
        words, invoke = model.logit_parts(hidden)
        if temperature != 1:
            words, invoke = words / temperature, invoke / temperature
        if best_words:
            words = words.logsumexp(-1, keepdim=True)
            columns = (columns - model.vocabulary + 1).clamp_min(0)
        invoke = invoke.masked_fill(barred, -torch.inf)
        total = torch.cat([words.logsumexp(-1, keepdim=True), invoke], dim=1).logsumexp(-1)
        is_word = columns < words.shape[1]
        at_word = words.gather(1, torch.where(is_word, columns, 0)[:, None])[:, 0]
        at_invoke = invoke.gather(1, torch.where(is_word, 0, columns - words.shape[1])[:, None])[:, 0]
        with torch.no_grad():
            shares = [_surprise(words, total), _surprise(invoke, total)]
        return torch.where(is_word, at_word, at_invoke) - total, shares[0] + shares[1]

    size = together(model.vocabulary)
    if len(hidden) <= size:
        return piece(hidden, columns, barred)
    pieces = [
        checkpoint(piece, *parts, use_reentrant=False)
        for parts in zip(*(torch.split(values, size) for values in (hidden, columns, barred)), strict=True)
    ]
    chosen, entropy = (torch.cat(values) for values in zip(*pieces, strict=True))
    return chosen, entropy


def _surprise(logits: Tensor, total: Tensor) -> Tensor:
    """(n,) what columns (n, columns) add to the entropy, nats."""
    logprobs = logits - total[:, None]
    share = logprobs.exp()
    summed: Tensor = torch.linalg.vecdot(share, logprobs.clamp_min_(torch.finfo(logits.dtype).min))
    return -summed
