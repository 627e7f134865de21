"""What a memory is formed from and how, against the paper's equations written out by hand (Eq. 3, 5, 6, 9-11)."""

from pathlib import Path

import pytest
import tiny
import tiny_stages
import torch
from looks import looked
from replayed import Formed, recorded
from torch import Tensor, nn

from vismem.config import InvocationConfig, MemoryConfig
from vismem.generation.engine import generate
from vismem.generation.invocation import Random
from vismem.generation.replay import prefill, score
from vismem.generation.types import Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base
from vismem.models.memory import FormationInputs, QueryBuilder, causal_mask, pooling
from vismem.models.tokens import delimiter_ids
from vismem.models.vismem import VisMemModel


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    """Moved off its initial weights, the base's norms too, so that no part is zero or one."""
    model = tiny_stages.eager_model(tiny_base)
    generator = torch.Generator().manual_seed(1)
    norms = [weight for name, weight in model.backbone.model.named_parameters() if "norm" in name]
    with torch.no_grad():
        for parameter in (*model.short.parameters(), *model.long.parameters(), *model.builder.parameters(), *norms):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def decoded(model: VisMemModel) -> list[tuple[Rollout, Formed]]:
    """Answers with several memories of both kinds, one by one, about one image and about two."""
    policy, answers = Random(probability=1.0, anywhere=0.6), []
    for sample in tiny.samples()[:6]:
        rollouts, formed = recorded(model, lambda s=sample: generate(model, [s], policy, max_new_tokens=8, seed=1))
        answers.append((rollouts[0], formed))
    assert {kind for _, formed in answers for kind, _, _ in formed} == set(MemoryKind)
    assert max(len(formed) for _, formed in answers) > 1
    return answers


# --- the cognitive state ---


def state_by_hand(model: VisMemModel, inputs: FormationInputs, rollout: Rollout, number: int) -> Tensor:
    """H of a rollout's memory `number`: from one pass over the stream, the visual states, then the segment's."""
    hidden = model.backbone.language(inputs.stream, inputs.positions, causal_mask(inputs.stream_mask))[0]
    opening, earlier = rollout.invocations[number], rollout.invocations[:number]
    start = earlier[-1].position + model.length_of(earlier[-1].kind) + 2 if earlier else 0  # behind the end token
    prompt = int(inputs.stream_mask.sum()) - opening.position - 1  # the stream ends with the invoke token
    segment = slice(prompt + start, prompt + opening.position + 1)
    return torch.cat([hidden[inputs.stream_visual[0]], hidden[segment]])


def test_the_cognitive_state_is_the_visual_states_then_the_segments_up_to_the_invoke_token(
    model: VisMemModel, decoded: list[tuple[Rollout, Formed]]
) -> None:
    for rollout, formed in decoded:
        sample = next(s for s in tiny.samples() if s.id == rollout.sample_id)
        _, again = recorded(
            model, lambda s=sample, r=rollout: score(model, prefill(model, [s]), [r], torch.zeros(1, dtype=torch.long))
        )
        for found in (formed, again):
            for number, (kind, inputs, _) in enumerate(found):
                assert kind is rollout.invocations[number].kind
                expected = state_by_hand(model, inputs, rollout, number)
                torch.testing.assert_close(inputs.cognitive[inputs.cognitive_mask], expected, atol=1e-5, rtol=1e-5)


# --- the query builder (Eq. 5) ---


def test_the_query_builder_is_a_pre_norm_transformer_encoder_whose_last_tokens_are_the_queries() -> None:
    torch.manual_seed(0)
    builder = QueryBuilder(32, MemoryConfig(queries=4, builder_layers=2, builder_heads=2, init_std=1.0))
    for parameter in builder.parameters():
        nn.init.normal_(parameter, std=0.3)
    layers = []
    for ours in builder.layers:
        theirs = nn.TransformerEncoderLayer(32, 2, 128, 0.0, nn.functional.gelu, batch_first=True, norm_first=True)
        pairs = {"norm1": ours.norm1, "norm2": ours.norm2, "linear1": ours.up, "linear2": ours.down}
        state = {f"{name}.{kind}": getattr(part, kind) for name, part in pairs.items() for kind in ("weight", "bias")}
        state |= {"self_attn.in_proj_weight": ours.qkv.weight, "self_attn.in_proj_bias": ours.qkv.bias}
        state |= {f"self_attn.out_proj.{kind}": getattr(ours.out, kind) for kind in ("weight", "bias")}
        theirs.load_state_dict(state)
        layers.append(theirs)
    state, barred = torch.randn(3, 7, 32), torch.zeros(11, 11, dtype=torch.bool)
    barred[:7, 7:] = True  # H never reads the queries
    expected = torch.cat([state, builder.query_init.expand(3, -1, -1)], dim=1)
    for layer in layers:
        expected = layer(expected, src_mask=barred)
    expected = nn.functional.layer_norm(expected[:, -4:], (32,), builder.norm.weight, builder.norm.bias)
    torch.testing.assert_close(builder(state, torch.ones(3, 7, dtype=torch.bool)), expected, atol=1e-5, rtol=1e-5)


# --- the formers (Eq. 9-11) ---


def shares(tokens: Tensor, slots: int) -> Tensor:
    """Means of the tokens (n, d) divided evenly among slots, in order; each repeated where they are fewer."""
    count = len(tokens)
    if count < slots:
        return torch.stack([tokens[slot * count // slots] for slot in range(slots)])
    slot = torch.tensor([rank * slots // count for rank in range(count)])
    return torch.stack([tokens[slot == number].mean(0) for number in range(slots)])


@pytest.mark.parametrize("marked", [3, 4, 6, 7, 12])
def test_pooling_divides_the_marked_tokens_evenly_and_in_order(marked: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, visual = torch.randn(2, 20, 5, generator=generator), torch.zeros(2, 20, dtype=torch.bool)
    for row in range(2):
        visual[row, torch.randperm(20, generator=generator)[:marked]] = True
    pooled = pooling(visual, 4) @ tokens
    for row in range(2):
        torch.testing.assert_close(pooled[row], shares(tokens[row, visual[row]], 4))


def test_a_long_memory_is_read_behind_the_stream_the_queries_and_its_own_places(
    model: VisMemModel, decoded: list[tuple[Rollout, Formed]]
) -> None:
    long = model.long
    for _, formed in decoded:
        for kind, inputs, memory in formed:
            if kind is not MemoryKind.LONG:
                continue
            queries = model.builder(inputs.cognitive, inputs.cognitive_mask)[0]
            places = long.memory_init + shares(inputs.stream[0, inputs.stream_visual[0]], long.length)
            added = torch.cat([queries @ long.query.weight.T * long.query_scale, places])
            follow = inputs.positions.max() + 1 + torch.arange(len(added))
            sequence = torch.cat([inputs.stream[0], added])[None]
            positions = torch.cat([inputs.positions, follow.expand(3, 1, -1)], dim=2)
            with long.lora.active():
                mask = causal_mask(torch.ones(sequence.shape[:2], dtype=torch.bool))
                hidden = model.backbone.language(sequence, positions, mask)[0, -long.length :]
            rms = hidden.square().mean(-1, keepdim=True).sqrt()
            expected = (hidden / rms) @ long.output.weight.T * long.output_scale + places
            torch.testing.assert_close(memory[0], expected, atol=1e-4, rtol=1e-4)


def test_a_short_memory_starts_from_the_images_patches_and_goes_through_the_projector(
    model: VisMemModel, decoded: list[tuple[Rollout, Formed]]
) -> None:
    short, backbone = model.short, model.backbone
    for _, formed in decoded:
        for kind, inputs, memory in formed:
            if kind is not MemoryKind.SHORT:
                continue
            assert inputs.patches is not None
            queries = model.builder(inputs.cognitive, inputs.cognitive_mask)
            seen = inputs.patches.features[0]
            said = inputs.cognitive[0, inputs.segment_mask[0]]
            tokens = short.memory_init + looked(short, queries[0], said, seen, inputs.patches.embeds[0])
            positions = looked(short, queries[0], said, seen, inputs.patches.vision.positions[0].float())
            sequence = torch.cat([short.query(queries), tokens[None]], dim=1)
            place = torch.cat([torch.full((queries.shape[1], 2), -1.0), positions])[None]
            with short.lora.active():
                hidden = backbone.memory_stream(sequence, place, inputs.patches, torch.zeros(1, dtype=torch.long))
            expected = backbone.project(hidden[:, -short.merge * short.length :])
            torch.testing.assert_close(memory, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_adds_its_scaled_product_to_the_queries_and_the_values_and_to_nothing_else(
    model: VisMemModel,
) -> None:
    backbone, width = model.backbone, model.backbone.vision_width
    language, memory = backbone.model.model.language_model, model.memory_config
    fused = [(block.attn.qkv, ((0, width), (2 * width, 3 * width))) for block in backbone.blocks]
    projections = [
        (projection, ((0, projection.out_features),))
        for layer in language.layers
        for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj)
    ]
    others = [
        module
        for module in backbone.model.modules()
        if isinstance(module, nn.Linear) and all(module is not target for target, _ in fused + projections)
    ]
    for lora, targets in ((model.short.lora, fused), (model.long.lora, projections), (model.policy_lora, projections)):
        keys = iter(lora.down)
        for module, columns in targets:
            x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
            expected = module(x)
            for start, stop in columns:
                key = next(keys)
                added = x @ lora.down[key].T @ lora.up[key].T
                expected[:, start:stop] += memory.lora_alpha / memory.lora_rank * added
            with lora.active():
                torch.testing.assert_close(module(x), expected)
        assert list(keys) == [], "no other target"
        for module in others:
            x = torch.ones(1, module.in_features)
            with lora.active():
                assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))


# --- where training starts ---


def test_an_untrained_memory_is_a_second_look_and_its_scales_are_the_embeddings(tiny_base: Path) -> None:
    sample, policy = tiny.samples()[0], Random(probability=1.0, kinds=(MemoryKind.LONG,), limit=1)
    for init in ("patches", "random"):
        memory = MemoryConfig(long_init=init, short_init=init, builder_heads=2)
        model = VisMemModel(load_base(tiny_base), memory, InvocationConfig())
        rms = model.backbone.embedding.weight.square().mean().sqrt()
        for scale in (model.long.query_scale, model.long.output_scale):
            assert scale.item() == pytest.approx(rms.item())
        _, ((_, inputs, formed),) = recorded(model, lambda m=model: generate(m, [sample], policy, max_new_tokens=2))
        if init == "patches":
            seen = inputs.stream[0, inputs.stream_visual[0]]
            torch.testing.assert_close(formed[0], shares(seen, model.long.length))
            assert not model.short.memory_init.any()
        else:
            torch.testing.assert_close(
                formed[0].square().mean(-1).sqrt(), rms.expand(memory.long_length), atol=1e-4, rtol=1e-3
            )
            assert model.long.memory_init.std().item() == pytest.approx(rms.item(), rel=0.3)
            assert model.short.memory_init.std().item() == pytest.approx(memory.init_std, rel=0.3)


def test_each_kinds_tokens_are_its_own(model: VisMemModel) -> None:
    tokenizer = model.backbone.processor.tokenizer
    for kind, letter in ((MemoryKind.SHORT, "s"), (MemoryKind.LONG, "l")):
        pair = [model.invoke_ids[kind], model.end_ids[kind]]
        assert tokenizer.convert_ids_to_tokens(pair) == [f"<m_I^{letter}>", f"<m_E^{letter}>"]
    rows = torch.cat([model.tokens.invoke, model.tokens.end])
    assert torch.equal(model.embed(torch.tensor(model.memory_ids)), rows)
    assert model.memory_ids == (*model.invoke_ids.values(), *model.end_ids.values())


@pytest.mark.parametrize("perturbation", [0.0, 0.1])
def test_the_new_tokens_start_as_a_delimiter_and_a_little_noise(tiny_base: Path, perturbation: float) -> None:
    config = InvocationConfig(perturbation=perturbation)
    model = VisMemModel(load_base(tiny_base), tiny.MEMORY, config)
    backbone, tokens = model.backbone, model.tokens
    (delimiter,) = backbone.processor.tokenizer(config.init_token, add_special_tokens=False)["input_ids"]
    new = (torch.cat([tokens.invoke, tokens.end]), backbone.embedding), (tokens.head, backbone.head)
    for rows, matrix in new:
        start = matrix.weight[delimiter]
        noise = (rows - start) / start.square().mean().sqrt()
        assert float(noise.square().mean().sqrt()) == pytest.approx(perturbation, rel=0.3)
        assert perturbation == 0 or len(noise.unique(dim=0)) == len(rows)
    assert not tokens.bias.any()


def test_delimiters_are_the_words_that_end_with_one_and_no_special_token(tiny_base: Path) -> None:
    tokenizer = load_base(tiny_base).processor.tokenizer
    found = {tokenizer.decode([token]) for token in delimiter_ids(tokenizer, (">", ".", "\n"))}
    assert {".", "\n", ">"} <= found
    assert all(text.rstrip(" ").endswith((">", ".", "\n")) for text in found)
    assert "<|im_end|>" not in found
    words = {tokenizer.decode([token]) for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids}
    assert found == {text for text in words if text.rstrip(" ")[-1:] in (">", ".", "\n")}
