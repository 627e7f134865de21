"""Forming a memory: which adapters are on, what reads what, and that the base's rows for memory tokens are barred."""

from pathlib import Path

import pytest
import tiny
import tiny_stages
import torch
from replayed import Formed, recorded
from torch import Tensor

from vismem.config import MemoryConfig
from vismem.generation.engine import generate
from vismem.generation.invocation import Learned, Random
from vismem.generation.replay import answer_states, prefill, score
from vismem.models.kinds import MemoryKind
from vismem.models.memory import QueryBuilder, causal_mask
from vismem.models.vismem import VisMemModel

TOKENS = 8


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    """All of its adapters would show, its own policy's too, which is on."""
    model = tiny_stages.eager_model(tiny_base)
    model.policy_lora.enabled = True
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def formed(model: VisMemModel) -> Formed:
    """Every memory of some answers that the policy's adapter decoded, with what it was formed from."""
    policy = Random(probability=1.0, anywhere=0.5)
    _, found = recorded(model, lambda: generate(model, tiny.samples()[:4], policy, max_new_tokens=TOKENS))
    assert {kind for kind, _, _ in found} == set(MemoryKind)
    assert model.policy_lora.enabled
    return found


# --- adapters ---


def test_a_memory_is_the_same_whether_the_policys_own_adapter_is_on_or_off(model: VisMemModel, formed: Formed) -> None:
    for kind, inputs, memory in formed:
        with model.policy_lora.active(False):
            assert torch.equal(model.form(kind, inputs), memory)


def test_prompts_are_read_for_memories_with_their_formers_adapter_and_no_other(model: VisMemModel) -> None:
    backbone, prompt = model.backbone, prefill(model, tiny.samples()[:4]).prompt
    prefix, stream = model.long_prefix(prompt), model.short_stream(prompt.vision)
    cut = slice(prefix.get_seq_length())
    assert cut.stop == int(prompt.mask.sum(1).min())
    with model.policy_lora.active(False):
        with model.long.lora.active():
            long = _keys_values(model, prompt.embeds[:, cut], prompt.positions[:, :, cut], prompt.mask[:, cut])
        with model.short.lora.active():
            short = backbone.patch_stream(prompt.vision)
        plain = _keys_values(model, prompt.embeds[:, cut], prompt.positions[:, :, cut], prompt.mask[:, cut])
        bare = backbone.patch_stream(prompt.vision)
    policy = _keys_values(model, prompt.embeds[:, cut], prompt.positions[:, :, cut], prompt.mask[:, cut])
    assert _equal([(layer.keys, layer.values) for layer in prefix.layers], long)
    assert not _equal(long, plain)
    assert not _equal(policy, plain)
    assert torch.equal(stream.features, short.features)
    assert _equal(stream.keys_values, short.keys_values)
    assert not torch.equal(stream.features, bare.features)


def test_each_former_runs_with_its_own_adapter_and_without_the_others(model: VisMemModel, formed: Formed) -> None:
    own = {MemoryKind.SHORT: model.short.lora, MemoryKind.LONG: model.long.lora}
    for kind, inputs, memory in formed:
        for lora in (model.short.lora, model.long.lora, model.policy_lora):
            saved = {name: value.clone() for name, value in lora.up.items()}
            for value in lora.up.values():
                value.zero_()
            same = torch.equal(model.form(kind, inputs), memory)
            lora.up.update({name: torch.nn.Parameter(value, False) for name, value in saved.items()})
            assert same == (lora is not own[kind])


def _keys_values(model: VisMemModel, embeds: Tensor, positions: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    from transformers import DynamicCache

    cache = DynamicCache()
    model.backbone.language(embeds, positions, causal_mask(mask), cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _equal(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


# --- the query builder ---


@pytest.fixture
def builder() -> QueryBuilder:
    torch.manual_seed(0)
    return QueryBuilder(32, MemoryConfig(queries=4, builder_layers=2, builder_heads=2, init_std=1.0))


STATE, MASK = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)), torch.ones(3, 7, dtype=torch.bool)


def test_the_states_never_read_the_queries_and_the_queries_read_all_of_them_and_each_other(
    builder: QueryBuilder,
) -> None:
    """Seen behind each layer: only the queries are returned, but in a second layer they would read what H has read."""
    seen: list[Tensor] = []
    for layer in builder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output[:, :7]))
    first = builder(STATE, MASK)
    for states in seen:
        (gradient,) = torch.autograd.grad(
            states.square().sum(), builder.query_init, retain_graph=True, allow_unused=True
        )
        assert gradient is None or not gradient.any()
    with torch.no_grad():
        builder.query_init *= torch.linspace(-1, 1, 32)
        second = builder(STATE, MASK)
        assert all(torch.equal(before, after) for before, after in zip(seen[:2], seen[2:], strict=True))
    assert (first - second).abs().amax(-1).gt(1e-3).all()
    state = STATE.clone().requires_grad_()
    (read,) = torch.autograd.grad(builder(state, MASK)[:, 0].square().sum(), state)
    assert read.abs().amax(-1).gt(0).all(), "every query reads every state"
    with torch.no_grad():
        before = builder(STATE, MASK)
        builder.query_init[3] *= -1
        assert (before - builder(STATE, MASK))[:, 0].abs().amax(-1).gt(1e-4).all(), "and every other query"


def test_padding_is_not_read_and_its_place_does_not_count(builder: QueryBuilder) -> None:
    mask = MASK.clone()
    mask[0, 4:], mask[1, :2], mask[2, 3] = False, False, False
    queries = builder(STATE, mask)
    for row in range(3):
        alone = builder(STATE[row : row + 1, mask[row]], MASK[:1, : int(mask[row].sum())])
        torch.testing.assert_close(queries[row], alone[0], atol=1e-5, rtol=1e-5)


# --- the base's own rows for memory tokens ---


def by_hand(model: VisMemModel, hidden: Tensor) -> Tensor:
    """(..., V + 2): the base's scores of what is no memory token, and the invokes'."""
    rows = [row for row in range(model.vocabulary) if row not in model.memory_ids]
    scores = torch.full((*hidden.shape[:-1], model.vocabulary + 2), -torch.inf)
    scores[..., rows] = hidden @ model.backbone.head.weight[rows].T
    scores[..., -2:] = hidden @ model.tokens.head.T + model.tokens.bias
    return scores


@pytest.fixture(scope="module")
def padded(tiny_base: Path) -> VisMemModel:
    """A model whose base would say memory tokens, were they not barred."""
    model = tiny_stages.eager_model(tiny_base).requires_grad_(False)
    assert max(model.memory_ids) < model.vocabulary, "as in real Qwen's head, which is padded"
    rows = torch.randn(4, model.backbone.width, generator=torch.Generator().manual_seed(0))
    model.backbone.head.weight[list(model.memory_ids)] = 10 * rows
    said = model.backbone.head(prefill(model, tiny.samples()).last).argmax(-1)
    assert torch.isin(said, torch.tensor(model.memory_ids)).any()
    return model


def test_the_bases_own_columns_of_memory_tokens_are_barred(padded: VisMemModel) -> None:
    last = prefill(padded, tiny.samples()).last
    logits = padded.logits(last)
    assert torch.isneginf(logits[:, list(padded.memory_ids)]).all()
    torch.testing.assert_close(logits, by_hand(padded, last))
    ids = torch.arange(padded.vocabulary)
    words = ids[~torch.isin(ids, torch.tensor(padded.memory_ids))]
    assert torch.equal(padded.column_of(words), words)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_replay_scores_words_among_words_and_invokes_alone(
    padded: VisMemModel, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = padded.invocation_config.model_copy(update={"max_per_answer": TOKENS})  # no limit that matters
    monkeypatch.setattr(padded, "invocation_config", own)
    samples = tiny.samples()
    rollouts = generate(padded, samples, Learned(), max_new_tokens=TOKENS, temperature=temperature, seed=5)
    context, row = prefill(padded, samples), torch.arange(len(samples))
    scores = score(padded, context, rollouts, row, Learned(), temperature=temperature)
    barred = score(padded, context, rollouts, row, temperature=temperature)  # as the policy Random samples
    logits = by_hand(padded, answer_states(padded, context, rollouts, row)) / temperature
    words = logits[..., : padded.vocabulary].log_softmax(-1)
    for index, rollout in enumerate(rollouts):
        after_memory = False
        for place, (token, sampled) in enumerate(zip(rollout.token_ids, rollout.loss_mask, strict=True)):
            if sampled:
                here = logits[index, place].clone()
                if after_memory:
                    here[-2:] = -torch.inf
                column = padded.column_of(torch.tensor(token))
                expected = here.log_softmax(-1)[column]
                assert float(scores.logprobs[index, place]) == pytest.approx(float(expected), abs=1e-4)
                assert rollout.logprobs[place] == pytest.approx(float(expected), abs=1e-4)
                if column < padded.vocabulary:
                    plain = words[index, place, column]
                    assert float(barred.logprobs[index, place]) == pytest.approx(float(plain), abs=1e-4)
            after_memory = token in padded.end_ids.values()
