"""A model as it is built, given another adapter, saved and loaded: what is on, what ends an answer, how rows start."""

from pathlib import Path

import tiny
import torch

from vismem.config import InvocationConfig
from vismem.generation.replay import prefill
from vismem.models.loading import load_base
from vismem.models.lora import Lora, LoraSettings
from vismem.models.tokens import delimiter_ids
from vismem.models.vismem import VisMemModel


def fresh(base: Path) -> VisMemModel:
    return VisMemModel(load_base(base), tiny.MEMORY, InvocationConfig(perturbation=0.5))


def states(model: VisMemModel) -> torch.Tensor:
    with torch.no_grad():
        return prefill(model, tiny.samples()[:2]).last


def test_fresh_adapters_are_off_and_change_nothing_where_they_are_on(tiny_base: Path) -> None:
    model = fresh(tiny_base)
    plain = states(model)
    for lora in (model.short.lora, model.long.lora, model.policy_lora):
        assert not lora.enabled
        with lora.active():
            assert torch.equal(states(model), plain)


def test_dropout_falls_on_an_adapters_input_in_training_only(tiny_base: Path) -> None:
    backbone = load_base(tiny_base)
    lora = Lora(backbone.language_targets(), LoraSettings(4, 8.0, 0.5))
    target = backbone.model.model.language_model.layers[0].self_attn.q_proj
    for up in lora.up.values():
        torch.nn.init.ones_(up)
    x = torch.ones(1, target.in_features)
    with lora.active(), torch.no_grad():
        lora.eval()
        assert torch.equal(target(x), target(x))
        lora.train()
        assert not torch.equal(target(x), target(x))


def test_a_saved_model_is_loaded_with_its_policys_adapter_on_or_off_as_it_was(tiny_base: Path, tmp_path: Path) -> None:
    for enabled in (True, False):
        model = fresh(tiny_base)
        model.policy_lora.enabled = enabled
        model.save_pretrained(tmp_path / str(enabled))
        assert VisMemModel.from_pretrained(tmp_path / str(enabled), tiny_base).policy_lora.enabled is enabled


def test_every_token_that_ends_the_bases_answers_ends_ours(tiny_base: Path) -> None:
    backbone = load_base(tiny_base)
    ends = backbone.model.generation_config.eos_token_id
    assert len(ends) > 1
    assert fresh(tiny_base).stop_ids == tuple(ends)


def test_the_invoke_tokens_head_rows_and_embeddings_are_their_own(tiny_base: Path) -> None:
    """In the order of their ids, as the noise is drawn: a row that is another token's would start as that one's."""
    model = fresh(tiny_base)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        embedding, head = model._initial_rows()
    assert torch.equal(torch.cat([model.tokens.invoke, model.tokens.end]), embedding)
    assert torch.equal(model.tokens.head, head[:2])
    assert not model.short.query.bias.any()


def test_a_delimiter_ends_a_word_and_need_not_begin_it(tiny_base: Path) -> None:
    tokenizer = load_base(tiny_base).processor.tokenizer
    tokenizer.add_tokens([".net", "etc.", "end. "])
    found = [tokenizer.decode([token]) for token in delimiter_ids(tokenizer, (".",))]
    assert {"etc.", "end. "} <= set(found)
    assert ".net" not in found
