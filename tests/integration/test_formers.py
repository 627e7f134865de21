"""How memories are formed, against torch's own layers and sums by hand (paper Sec. 3.3, Eq. 5-6 and 9-11)."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import tiny_families as families
import torch
from looks import looked
from torch import Tensor, nn
from torch.testing import assert_close

from vismem.config import InvocationConfig, MemoryConfig
from vismem.errors import UserError
from vismem.generation.prompts import encode
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base
from vismem.models.lora import Lora, LoraTarget
from vismem.models.memory import FormationInputs, QueryBuilder, causal_mask, pooling, summary
from vismem.models.vismem import VisMemModel

WIDTH = 32  # of the tiny model
REAL = (5, 3, 4)  # real entries of three rows, padded to 5
SAMPLES = torch.tensor([0, 1, 0])


@pytest.fixture(scope="module", params=["patches", "random"])
def model(request: pytest.FixtureRequest, tiny_base: Path) -> VisMemModel:
    start = {"short_init": request.param, "long_init": request.param, "lora_alpha": 8.0}
    memory = tiny.MEMORY.model_copy(update=start)
    return tiny.vismem(tiny_base, memory).requires_grad_(False)


@pytest.fixture(scope="module")
def inputs(model: VisMemModel) -> FormationInputs:
    """Three rows of two samples, with random states and embeddings behind each other."""
    states, stream = noise(2, 3, max(REAL), WIDTH)
    real = torch.arange(max(REAL)) < torch.tensor(REAL)[:, None]
    visual = torch.tensor([[True, True, True, True, False], [False, True, True, False, False], [True] + 4 * [False]])
    positions = torch.arange(max(REAL)).expand(3, 3, -1).clone()
    positions[:, 2, 1:] += 4  # as behind an image, whose tokens share positions
    positions[:, ~real] = 99  # padding counts for nothing
    vision = encode(model.backbone, families.samples()[:2]).vision
    assert len(set(vision.mask.sum(1).tolist())) == 2, "one sample should be padded"
    patches = model.short_stream(vision)
    said = real & (torch.arange(max(REAL)) > 0)
    return FormationInputs(SAMPLES, states, real, said, stream, positions, real, visual, patches)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@contextmanager
def merged(adapter: Lora, targets: list[LoraTarget]) -> Iterator[None]:
    """The base with the product of the adapter's matrices added to its weights, in place of the adapter."""
    kept = [target.module.weight.clone() for target in targets]
    for target, down, up in zip(targets, adapter.down.values(), adapter.up.values(), strict=True):
        target.module.weight[target.start : target.stop] += 2 * up @ down  # alpha 8, rank 4
    yield
    for target, weight in reversed(list(zip(targets, kept, strict=True))):
        target.module.weight.copy_(weight)


# --- the query builder ---


def test_heads_that_do_not_divide_the_width_are_refused_before_anything_is_formed() -> None:
    with pytest.raises(UserError, match=f"memory.builder_heads 3 must divide the base's width, {WIDTH}"):
        QueryBuilder(WIDTH, MemoryConfig(builder_heads=3))


def test_queries_are_read_by_a_pre_norm_transformer_from_the_states_and_each_other() -> None:
    config = MemoryConfig(queries=4, builder_layers=2, builder_heads=4, init_std=0.5)
    builder = QueryBuilder(WIDTH, config)
    for parameter in builder.parameters():  # biases and norms off their initial values
        parameter.data += noise(*parameter.shape) * 0.1
    hidden = torch.cat([noise(3, 5, WIDTH), builder.query_init.expand(3, -1, -1)], dim=1)
    real = torch.arange(5) < torch.tensor(REAL)[:, None]
    assert len(builder.layers) == 2
    for layer in builder.layers:
        hidden = as_torch(layer)(hidden, src_mask=barred(real, 4).repeat_interleave(4, dim=0))
    assert_close(builder(noise(3, 5, WIDTH), real), builder.norm(hidden[:, 5:]), atol=1e-5, rtol=1e-5)


def as_torch(layer: nn.Module) -> nn.Module:
    """torch's own transformer layer with the weights of one of the builder's."""
    theirs = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
    names = {"norm1": layer.norm1, "norm2": layer.norm2, "linear1": layer.up, "linear2": layer.down}
    for name, ours in {**names, "self_attn.out_proj": layer.out}.items():
        theirs.get_submodule(name).load_state_dict(ours.state_dict())
    theirs.self_attn.in_proj_weight.data, theirs.self_attn.in_proj_bias.data = layer.qkv.weight, layer.qkv.bias
    return theirs


def barred(real: Tensor, queries: int) -> Tensor:
    """(R, T + K, T + K) True where an entry may not be read: padding but by itself, and queries by states."""
    rows, length = real.shape
    total = length + queries
    mask = torch.ones(rows, total, total, dtype=torch.bool)
    for row in range(rows):
        for reader in range(total):
            for read in range(total):
                state = read < length and bool(real[row, read])
                query = read >= length and reader >= length
                mask[row, reader, read] = not (state or query or read == reader)
    return mask


# --- masks and pooling ---


def test_an_entry_reads_itself_and_the_real_ones_before_it() -> None:
    keys = torch.tensor([[True, True, False, True], [False, True, True, False]])
    whole = causal_mask(keys)
    assert whole.shape == (2, 1, 4, 4)
    for row, query, key in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).tolist():
        assert bool(whole[row, 0, query, key]) == (key == query or (key < query and bool(keys[row, key])))
    for last in (1, 3, 4):
        assert torch.equal(causal_mask(keys, last), whole[:, :, -last:])


def test_tokens_are_divided_evenly_among_slots_in_their_order() -> None:
    marked = torch.tensor([[True, False, True, True, True, True], [False, True, False, True, False, False]])
    third, half = 1 / 3, 1 / 2
    expected = torch.tensor(
        [
            [[third, 0, third, third, 0, 0], [0, 0, 0, 0, half, half]],  # five tokens: three and two
            [[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]],
        ]
    )
    assert_close(pooling(marked, 2), expected)


def test_tokens_are_repeated_where_there_are_fewer_than_slots_and_none_give_zeros() -> None:
    marked = torch.tensor([[False, True, True], [False, False, True], [False, False, False]])
    first, second, nothing = [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]
    expected = torch.tensor([[first, first, first, second, second], [second] * 5, [nothing] * 5])
    assert_close(pooling(marked, 5), expected)


# --- the memories ---


def test_a_short_memory_is_read_beside_its_patches_from_where_its_queries_look(
    model: VisMemModel, inputs: FormationInputs
) -> None:
    former, backbone, queries, patches = model.short, model.backbone, noise(3, 4, WIDTH), inputs.patches
    assert patches is not None
    found = former(backbone, queries, summary(inputs.cognitive, inputs.segment_mask), patches, inputs.sample)
    assert found.shape == (3, 4, WIDTH)
    with merged(former.lora, backbone.vision_targets()):
        stream = backbone.patch_stream(patches.vision)
        for row, sample in enumerate(SAMPLES.tolist()):
            start, places = former.memory_init, torch.full((4 * backbone.merge, 2), -1.0)
            if former.patches:
                real = patches.vision.mask[sample]
                seen = stream.features[sample, real[:: backbone.merge]]
                said = inputs.cognitive[row, inputs.segment_mask[row]]
                start = start + looked(former, queries[row], said, seen, stream.embeds[sample, real])
                places = looked(former, queries[row], said, seen, patches.vision.positions[sample, real].float())
            tokens = torch.cat([former.query(queries[row]), start])
            positions = torch.cat([torch.full((4, 2), -1.0), places])
            hidden = backbone.memory_stream(tokens[None], positions[None], stream, SAMPLES[row : row + 1])
            assert_close(found[row], backbone.project(hidden[:, 4:])[0], atol=1e-4, rtol=1e-3)


def test_a_long_memory_is_read_by_the_language_model_behind_the_row_and_its_queries(
    model: VisMemModel, inputs: FormationInputs
) -> None:
    former, backbone, queries = model.long, model.backbone, noise(3, 4, WIDTH)
    found = former(backbone, queries, inputs)
    assert found.shape == (3, 6, WIDTH)
    with merged(former.lora, backbone.language_targets()):
        for row, real in enumerate(REAL):
            seen = inputs.stream[row, inputs.stream_visual[row]]
            start = former.memory_init
            if former.patches:
                start = start + torch.stack([seen[slot].mean(0) for slot in slots(len(seen), 6)])
            asked = queries[row] @ former.query.weight.T * former.query_scale
            embeds = torch.cat([inputs.stream[row, :real], asked, start])
            before = inputs.positions[0, row, :real]
            positions = torch.cat([before, before.max() + 1 + torch.arange(10)])
            whole = causal_mask(torch.ones(1, real + 10, dtype=torch.bool))
            hidden = backbone.language(embeds[None], positions.expand(3, 1, -1), whole)[0, -6:]
            hidden = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
            expected = hidden @ former.output.weight.T * former.output_scale + (start if former.patches else 0)
            assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


def test_a_long_memory_is_the_same_with_the_first_tokens_of_its_prompt_read_before(model: VisMemModel) -> None:
    former, backbone, queries = model.long, model.backbone, noise(3, 4, WIDTH)
    prompt = encode(backbone, families.samples()[2:4])
    rows = (prompt.embeds[SAMPLES], prompt.positions[:, SAMPLES], prompt.mask[SAMPLES], prompt.visual[SAMPLES])
    prefix = former.prefill(backbone, prompt)
    assert prefix.get_seq_length() == min(prompt.mask.sum(1).tolist()) < prompt.mask.shape[1]
    alone, cached = (
        former(backbone, queries, FormationInputs(SAMPLES, noise(1), noise(1), noise(1), *rows, None, read))
        for read in (None, prefix)
    )
    assert_close(cached, alone, atol=1e-5, rtol=1e-4)


def slots(tokens: int, count: int) -> list[list[int]]:
    """The tokens of each slot, fewer tokens than slots: slots in their order repeat tokens in theirs."""
    return [[slot * tokens // count] for slot in range(count)]


def test_each_hidden_state_is_divided_by_its_root_mean_square_with_an_epsilon(model: VisMemModel) -> None:
    scale = torch.tensor([1e-3, 1.0, 2.0, 3.0, 4.0, 5.0])  # the first one's mean square is 1e-6, and as much is added
    hidden = torch.cat([torch.zeros(2), scale])[None, :, None].expand(1, 8, WIDTH)
    expected = torch.full((6, WIDTH), 1.0)
    expected[0] = 0.5**0.5
    expected = expected @ model.long.output.weight.T * model.long.output_scale
    assert_close(model.long.read_out(hidden)[0], expected, atol=1e-6, rtol=1e-4)


def test_a_memory_of_either_kind_comes_from_its_former_with_the_queries_of_the_states(
    model: VisMemModel, inputs: FormationInputs
) -> None:
    queries = model.builder(inputs.cognitive, inputs.cognitive_mask)
    assert inputs.patches is not None
    said = summary(inputs.cognitive, inputs.segment_mask)
    short = model.short(model.backbone, queries, said, inputs.patches, inputs.sample)
    assert torch.equal(model.form(MemoryKind.SHORT, inputs), short)
    assert torch.equal(model.form(MemoryKind.LONG, inputs), model.long(model.backbone, queries, inputs))


def test_memories_on_a_base_in_bfloat16_are_those_in_float32_but_for_rounding(
    model: VisMemModel, inputs: FormationInputs, tiny_base: Path
) -> None:
    low = VisMemModel(load_base(tiny_base, "bfloat16"), model.memory_config, model.invocation_config)
    low.load_state_dict(model.state_dict())
    patches = low.short_stream(encode(low.backbone, families.samples()[:2]).vision)
    stream, states = inputs.stream.bfloat16(), inputs.cognitive.bfloat16()
    rounded = dataclasses.replace(inputs, cognitive=states, stream=stream, patches=patches)
    for kind in MemoryKind:
        expected, found = model.form(kind, inputs), low.form(kind, rounded)
        assert found.dtype == torch.bfloat16
        assert rms(found.float() - expected) < 0.1 * rms(expected), kind


# --- what is initial ---


@pytest.fixture(params=["patches", "random"])
def fresh(request: pytest.FixtureRequest, tiny_base: Path) -> VisMemModel:
    """As training starts from it, with long memories so that spreads can be measured."""
    sizes = {"short_length": 64, "long_length": 64, "init_std": 0.3}
    start = {"short_init": request.param, "long_init": request.param}
    memory = tiny.MEMORY.model_copy(update=sizes | start)
    return VisMemModel(load_base(tiny_base), memory, InvocationConfig()).requires_grad_(False)


def test_initial_vectors_are_zero_beside_patches_and_random_alone(fresh: VisMemModel) -> None:
    short, long, scale = fresh.short, fresh.long, float(fresh.backbone.embedding.weight.pow(2).mean().sqrt())
    assert short.memory_init.shape == (64 * fresh.backbone.merge, fresh.backbone.vision_width)
    assert long.memory_init.shape == (64, WIDTH)
    spread = (0.0, 0.0) if short.patches else (0.3, scale)
    assert (rms(short.memory_init), rms(long.memory_init)) == pytest.approx(spread, rel=0.1)
    assert rms(short.query.weight) == pytest.approx(0.3, rel=0.1)
    assert not short.query.bias.any()
    for adapter in (short.lora, long.lora):
        assert not any(matrix.any() for matrix in adapter.up.values())


def test_queries_and_what_is_read_are_first_brought_to_the_scale_of_embeddings(fresh: VisMemModel) -> None:
    long, scale = fresh.long, float(fresh.backbone.embedding.weight.pow(2).mean().sqrt())
    assert float(long.query_scale) == pytest.approx(scale)
    assert float(long.output_scale) == pytest.approx(scale)
    assert torch.equal(long.query.weight, torch.eye(WIDTH))
    assert torch.equal(long.output.weight, torch.zeros(WIDTH, WIDTH) if long.patches else torch.eye(WIDTH))
    assert long.query.bias is None
    assert long.output.bias is None


def rms(values: Tensor) -> float:
    return float(values.detach().pow(2).mean().sqrt())


def test_initial_queries_have_the_configured_spread() -> None:
    builder = QueryBuilder(512, MemoryConfig(queries=64, init_std=0.3))
    assert builder.query_init.shape == (64, 512)
    assert rms(builder.query_init) == pytest.approx(0.3, rel=0.05)
