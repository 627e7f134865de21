"""The scores of recorded tokens are those of the categorical distribution over words and invoke tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vismem.generation import token_scores as module
from vismem.generation.token_scores import token_scores

WORDS, WIDTH = 5, 3
COLUMNS = torch.tensor([0, 4, 5, 6, 2, 6, 1, 5, 3])
BARRED = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 1], [0, 0], [1, 1]], dtype=torch.bool)


def model() -> Any:
    """A head of five words, the last of which is barred, and two invoke tokens."""
    torch.manual_seed(0)
    words, invoke = torch.randn(WIDTH, WORDS), torch.randn(WIDTH, 2)

    def logit_parts(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden @ words, hidden @ invoke

    return SimpleNamespace(vocabulary=WORDS, logit_parts=logit_parts)


def hidden() -> Tensor:
    return torch.randn(len(COLUMNS), WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def expected(states: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    words, invoke = model().logit_parts(states)
    logits = torch.cat([words, invoke.masked_fill(BARRED, -torch.inf)], dim=1) / temperature
    distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
    return distribution.log_prob(COLUMNS), distribution.entropy()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("held", [2**26, 4 * WORDS, 2 * WORDS - 1, 1])
def test_scores_entropy_and_gradient_are_those_of_the_distribution(
    held: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many logits are held at a time."""
    monkeypatch.setattr(module, "MAX_LOGITS", held)
    states, same = hidden(), hidden()
    chosen, entropy = token_scores(model(), states, COLUMNS, BARRED, temperature)
    logprobs, spread = expected(same, temperature)
    torch.testing.assert_close(chosen, logprobs)
    torch.testing.assert_close(entropy, spread)
    chosen.sum().backward()
    logprobs.sum().backward()
    torch.testing.assert_close(states.grad, same.grad)
    assert not entropy.requires_grad


def test_a_word_that_never_comes_adds_nothing_to_the_entropy() -> None:
    """A memory token among the base's own columns has a logit of minus infinity."""
    plain = model()

    def barred(states: Tensor) -> tuple[Tensor, Tensor]:
        words, invoke = plain.logit_parts(states)
        return words.index_fill(-1, torch.tensor([4]), -torch.inf), invoke

    scored: Any = SimpleNamespace(vocabulary=WORDS, logit_parts=barred)
    _, entropy = token_scores(scored, hidden(), COLUMNS.clamp_max(3), BARRED, 1.0)
    words, invoke = barred(hidden())
    logits = torch.cat([words, invoke.masked_fill(BARRED, -torch.inf)], dim=1)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())


@pytest.mark.parametrize(
    ("held", "sizes"), [(3 * WORDS, [3, 3, 3]), (4 * WORDS + 1, [4, 4, 1]), (9 * WORDS, [9]), (1, [1] * 9)]
)
def test_no_more_logits_are_held_than_the_limit(held: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOGITS", held)
    plain, found = model(), []

    def counted(states: Tensor) -> tuple[Tensor, Tensor]:
        found.append(len(states))
        parts: tuple[Tensor, Tensor] = plain.logit_parts(states)
        return parts

    scored: Any = SimpleNamespace(vocabulary=WORDS, logit_parts=counted)
    chosen, _ = token_scores(scored, hidden(), COLUMNS, BARRED, 1.0)
    assert found == sizes
    chosen.sum().backward()
    assert sorted(found) == sorted(sizes * (1 + (len(sizes) > 1))), "pieces are computed again, the whole is not"
