"""VisMem's model by itself: the grown vocabulary, what it starts from, and its files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from vismem.config import InvocationConfig
from vismem.errors import UserError
from vismem.files import read_json, write_json
from vismem.generation.prompts import encode
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base
from vismem.models.lora import LoraSettings
from vismem.models.memory import causal_mask
from vismem.models.policy import PolicyWeights, TokenRows
from vismem.models.tokens import delimiter_ids
from vismem.models.variants import load_variant
from vismem.models.vismem import VisMemModel


@pytest.fixture
def model(tiny_base: Path) -> VisMemModel:
    return tiny.vismem(tiny_base).requires_grad_(False)


def made(base: Path, seed: int = 0, **invocation: Any) -> VisMemModel:
    return VisMemModel(load_base(base), tiny.MEMORY, InvocationConfig(**invocation), seed)


# --- the vocabulary ---


def test_the_four_new_tokens_are_embedded_by_their_own_rows_and_all_others_by_the_base(model: VisMemModel) -> None:
    short, long, short_end, long_end = model.memory_ids
    assert model.invoke_ids == {MemoryKind.SHORT: short, MemoryKind.LONG: long}
    assert model.end_ids == {MemoryKind.SHORT: short_end, MemoryKind.LONG: long_end}
    words = model.backbone.processor.tokenizer
    assert model.delimiter_ids == delimiter_ids(words, model.invocation_config.delimiters) != ()
    embeds = model.embed(torch.tensor([[long_end, 5, short], [0, long, short_end]]))
    table, tokens = model.backbone.embedding.weight, model.tokens
    expected = [tokens.end[1], table[5], tokens.invoke[0], table[0], tokens.invoke[1], tokens.end[0]]
    assert torch.equal(embeds, torch.stack(expected).view(2, 3, -1))


def test_logits_are_the_base_s_then_two_of_the_invokes_own_head(model: VisMemModel) -> None:
    hidden = torch.randn(2, 3, model.backbone.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.tokens.bias.copy_(torch.tensor([3.0, -4.0]))
    logits, base = model.logits(hidden), model.backbone.head(hidden)
    barred = [token for token in model.memory_ids if token < model.vocabulary]
    kept = [token for token in range(model.vocabulary) if token not in barred]
    assert model.vocabulary == base.shape[-1]
    assert torch.equal(logits[..., kept], base[..., kept])
    assert torch.isneginf(logits[..., barred]).all()
    own = hidden @ model.tokens.head.T + torch.tensor([3.0, -4.0])
    assert torch.equal(logits[..., model.vocabulary :], own)


def test_rows_of_the_base_s_own_for_memory_tokens_are_neither_sampled_nor_embedded(
    tiny_base: Path, tmp_path: Path
) -> None:
    """Published models have more rows than their tokenizers have tokens."""
    base = load_base(tiny_base)
    tokens = len(base.processor.tokenizer)
    base.model.resize_token_embeddings(tokens + 8)
    base.model.save_pretrained(tmp_path)
    base.processor.save_pretrained(tmp_path)
    model = tiny.vismem(tmp_path)
    assert model.memory_ids == tuple(range(tokens, tokens + 4))
    logits = model.logits(torch.ones(2, model.backbone.width))
    assert torch.isneginf(logits).nonzero().tolist() == [[row, id] for row in (0, 1) for id in model.memory_ids]
    expected = torch.cat([model.tokens.invoke, model.tokens.end])
    assert torch.equal(model.embed(torch.tensor(model.memory_ids)), expected)
    last = torch.tensor([tokens + 7])
    assert torch.equal(model.embed(last), model.backbone.embedding(last))


def test_invoke_tokens_have_the_two_last_columns(model: VisMemModel) -> None:
    short, long, *_ = model.memory_ids
    ids = torch.tensor([[0, short, 7], [long, 3, short]])
    columns = model.column_of(ids)
    assert columns.tolist() == [[0, model.vocabulary, 7], [model.vocabulary + 1, 3, model.vocabulary]]


@pytest.mark.parametrize(("eos", "expected"), [(5, (5,)), ([5, 6], (5, 6)), (None, None)])
def test_an_answer_stops_at_what_the_base_generates_until_or_at_its_tokenizer_s_end(
    eos: Any, expected: tuple[int, ...] | None, tiny_base: Path
) -> None:
    backbone = load_base(tiny_base)
    backbone.model.generation_config.eos_token_id = eos
    model = VisMemModel(backbone, tiny.MEMORY, InvocationConfig())
    assert model.stop_ids == (expected or (backbone.processor.tokenizer.eos_token_id,))


# --- what it starts from ---


def test_new_rows_start_at_a_delimiter_s_with_a_small_perturbation(tiny_base: Path) -> None:
    exact, near = made(tiny_base, init_token=";", perturbation=0.0), made(tiny_base, init_token=";", perturbation=0.1)
    delimiter = exact.backbone.processor.tokenizer.convert_tokens_to_ids(";")
    embedding, head = (matrix.weight[delimiter] for matrix in (exact.backbone.embedding, exact.backbone.head))
    for name, row in (("invoke", embedding), ("end", embedding), ("head", head)):
        rows = getattr(exact.tokens, name)
        assert torch.equal(rows, row.expand(2, -1)), name
        spread = (getattr(near.tokens, name) - row).pow(2).mean().sqrt()
        assert float((spread / row.pow(2).mean().sqrt()).detach()) == pytest.approx(0.1, rel=0.3), name
    assert len({str(row) for name in ("invoke", "end") for row in getattr(near.tokens, name).tolist()}) == 4
    assert not near.tokens.bias.any()
    assert near.tokens.bias.shape == (2,)


def test_a_delimiter_of_several_tokens_is_refused(tiny_base: Path) -> None:
    with pytest.raises(UserError, match=r"^invocation.init_token ';;' must be one token of qwen2_5_vl, not \["):
        made(tiny_base, init_token=";;")


def test_the_seed_alone_decides_what_a_model_starts_from(tiny_base: Path) -> None:
    state = torch.get_rng_state()
    first, again, other = (made(tiny_base, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state), "the process's own random numbers go on as before"
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["builder.query_init"], other["builder.query_init"])


def test_only_what_vismem_adds_is_trainable(tiny_base: Path) -> None:
    model = made(tiny_base)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.backbone.model.parameters())
    assert not model.training
    assert not model.backbone.model.training
    assert (model.length_of(MemoryKind.SHORT), model.length_of(MemoryKind.LONG)) == (4, 6)
    assert not model.policy_lora.enabled


def test_the_policy_s_weights_are_kept_as_they_were_and_the_reference_has_them(model: VisMemModel) -> None:
    model.policy_lora.enabled = True
    model.requires_grad_(True)
    prompt = encode(model.backbone, tiny.samples()[:2])

    def scores() -> torch.Tensor:
        hidden = model.backbone.language(prompt.embeds, prompt.positions, causal_mask(prompt.mask))
        return model.logits(hidden).detach()

    before, start = scores(), PolicyWeights(model.tokens, model.policy_lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("tokens.", "policy_lora.")):
                parameter += 0.1
    changed = scores()
    assert not torch.equal(changed, before)
    with model.reference(start):
        assert torch.equal(scores(), before)
    assert torch.equal(scores(), changed)
    assert len(list(start.parameters())) == 4 + len(list(model.policy_lora.parameters()))
    assert not any(parameter.requires_grad for parameter in start.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_token_rows_take_the_first_two_of_each_matrix_for_invokes_and_the_rest_for_ends() -> None:
    embedding, head = torch.arange(8.0).view(4, 2), 10 + torch.arange(8.0).view(4, 2)
    rows = TokenRows(embedding, head)
    assert torch.equal(rows.invoke, embedding[:2])
    assert torch.equal(rows.end, embedding[2:])
    assert torch.equal(rows.head, head[:2])
    embedding.zero_()
    assert rows.end.all(), "a copy"


# --- files ---


def test_memory_and_policy_are_written_apart_and_come_back(model: VisMemModel, tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "model"
    model.save_pretrained(folder)
    model.save_pretrained(folder)
    memory, policy = (load_file(folder / f"{name}.safetensors") for name in ("memory", "policy"))
    assert {name.partition(".")[0] for name in policy} == {"tokens", "policy_lora"}
    assert {name.partition(".")[0] for name in memory} == {"builder", "short", "long"}
    again = VisMemModel.from_pretrained(folder, tiny_base)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert (again.memory_config, again.invocation_config) == (model.memory_config, model.invocation_config)
    assert not again.policy_lora.enabled
    settings = read_json(folder / "vismem.json")
    assert settings.keys() == {
        "format", "variant", "family", "memory", "invocation", "memory_ids", "policy_lora", "policy_settings",
        "dtype", "max_new_tokens",
    }  # fmt: skip
    assert (settings["format"], settings["family"]) == (3, "qwen2_5_vl")


def test_a_policy_s_own_adapter_comes_back_as_it_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    model, settings = tiny.vismem(tiny_base), LoraSettings(2, 8.0, 0.1, every_linear=True)
    before = len(model.policy_lora.up)
    model.set_policy_lora(settings)
    assert len(model.policy_lora.up) > before
    assert not model.policy_lora.training
    model.policy_lora.enabled = True
    model.save_pretrained(tmp_path)
    again = VisMemModel.from_pretrained(tmp_path, tiny_base)
    assert again.policy_lora.enabled
    assert again.policy_lora.settings == settings
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_another_adapter_leaves_none_of_the_first_on_the_base(tiny_base: Path) -> None:
    model = tiny.vismem(tiny_base)
    embeds, positions = torch.randn(1, 2, model.backbone.width), torch.arange(2).expand(3, 1, -1)
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool).tril()
    plain = model.backbone.language(embeds, positions, mask)
    torch.nn.init.ones_(next(iter(model.policy_lora.up.values())))
    model.policy_lora.enabled = True
    assert not torch.equal(model.backbone.language(embeds, positions, mask), plain)
    model.set_policy_lora(LoraSettings(2, 8.0, 0.0, every_linear=True))
    assert not model.policy_lora.enabled
    assert torch.equal(model.backbone.language(embeds, positions, mask), plain)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 1}, "{folder} has format 1, this release reads 3: train it anew"),
        ({"family": "internvl"}, "{folder} was trained on internvl, but the base is qwen2_5_vl"),
        ({"memory_ids": [1, 2, 3, 4]}, "'{base}' has another tokenizer than the one that {folder} was trained with"),
    ],
)
def test_a_folder_that_another_base_was_trained_with_is_refused(
    changed: dict[str, Any], message: str, model: VisMemModel, tiny_base: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    write_json(tmp_path / "vismem.json", read_json(tmp_path / "vismem.json") | changed)
    with pytest.raises(UserError) as refused:
        VisMemModel.from_pretrained(tmp_path, tiny_base)
    assert str(refused.value) == message.format(folder=tmp_path, base=tiny_base)


@pytest.mark.parametrize("key", ["memory", "invocation", "policy_settings", "memory_ids"])
def test_settings_of_a_later_release_are_refused(key: str, model: VisMemModel, tiny_base: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    settings = read_json(tmp_path / "vismem.json")
    for value in ({"luck": 7}, 7):
        write_json(tmp_path / "vismem.json", settings | {key: value})
        with pytest.raises(UserError, match=r"vismem\.json is damaged, or of a later release|has another tokenizer"):
            load_variant(tmp_path, tiny_base)


def test_a_folder_or_a_base_that_is_missing_is_named(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give a folder that stage1, stage2 or export wrote$"):
        VisMemModel.from_pretrained(tmp_path, tiny_base)
    with pytest.raises(UserError, match=r"^no vision-language model at '.*gone' \(a hub id or a folder\): ") as refused:
        load_base(tmp_path / "gone")
    assert "\n" not in str(refused.value)


def test_a_base_is_loaded_in_the_precision_that_is_asked_for(tiny_base: Path) -> None:
    assert load_base(tiny_base).embedding.weight.dtype == torch.float32
    assert load_base(str(tiny_base), "bfloat16").embedding.weight.dtype == torch.bfloat16


def test_a_baselines_adapter_is_taken_over_alone_and_only_where_it_has_this_models_size(
    tiny_base: Path, tmp_path: Path
) -> None:
    trained, model = made(tiny_base, seed=1), made(tiny_base)
    with torch.no_grad():
        for up in trained.policy_lora.up.values():
            up.fill_(0.5)
    trained.save_pretrained(tmp_path / "off")
    trained.policy_lora.enabled = True
    trained.save_pretrained(tmp_path / "on")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_policy_lora(tmp_path / "on")
    for name, value in model.state_dict().items():
        own = trained.state_dict() if name.startswith("policy_lora.") else before
        assert torch.equal(value, own[name]), name
    with pytest.raises(UserError, match="has no LoRA of this size"):
        model.load_policy_lora(tmp_path / "off")
    same = model.policy_lora.settings
    for other in ({"rank": same.rank + 1}, {"alpha": same.alpha + 1}, {"every_linear": True}):
        model.set_policy_lora(replace(same, **other))
        with pytest.raises(UserError, match="give a folder that the same baseline wrote"):
            model.load_policy_lora(tmp_path / "on")


def test_a_memorys_length_and_how_many_are_within_the_models_own_limit(model: VisMemModel) -> None:
    lengths = {MemoryKind.SHORT: model.memory_config.short_length, MemoryKind.LONG: model.memory_config.long_length}
    assert {kind: model.length_of(kind) for kind in MemoryKind} == lengths
    assert model.slots_of(MemoryKind.SHORT) == model.backbone.merge * lengths[MemoryKind.SHORT]
    assert model.slots_of(MemoryKind.LONG) == lengths[MemoryKind.LONG]
    assert [model.limit(asked) for asked in (None, 0, 1, 3, 9)] == [3, 0, 1, 3, 3]
