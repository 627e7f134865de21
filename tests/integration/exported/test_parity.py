"""ONNX equals torch: the same tokens, the same memories."""

import io
import json
from dataclasses import replace

import numpy as np
import onnx_ir
import pytest
import tiny
import torch
from pictures import TOKENS, by_graphs, by_torch, encoded, noise, pictures
from PIL import ExifTags, Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vismem.data.sample import Sample
from vismem.export.graphs import Decoder, Fused
from vismem.export.onnx import WEIGHTS, WeightFile, _exported, graphs_of
from vismem.export.parity import check_parity, memory_difference
from vismem.generation.engine import generate
from vismem.generation.invocation import Learned
from vismem.generation.loop import Request
from vismem.generation.onnx_executor import OnnxExecutor
from vismem.generation.prompts import encode
from vismem.generation.types import LATENT
from vismem.models.kinds import MemoryKind
from vismem.models.lora import Lora, LoraSettings, LoraTarget
from vismem.models.memory import causal_mask
from vismem.models.vismem import VisMemModel
from vismem.runtime.bundle import Graph


def test_greedy_tokens_are_torchs_and_memories_agree_within_the_tolerance(bundle):
    parity = json.loads((bundle / "parity.json").read_text())
    assert parity["passed"] is True
    assert parity["items"] == parity["greedy_equal"] == 6
    assert parity["memories"] > 12  # two forced an item, and some that the model asked for
    assert parity["max_memory_difference"] < 1e-4


def test_images_of_any_size_and_number_give_torchs_tokens_and_memories(model, runtime):
    images = encoded(noise(84, 84), noise(130, 60, 1), noise(60, 190, 2))
    sample = Sample(id="x", images=images, question="naïve: 色?\nwhich image has more", answer="")
    forced = {0: MemoryKind.LONG, 2: MemoryKind.SHORT, 5: MemoryKind.LONG}
    expected, reference = by_torch(model, sample, forced)
    tokens, memories = by_graphs(runtime.executor.bundle, sample, forced)
    assert tokens == expected
    assert len(memories) == 3
    for ours, theirs in zip(memories, reference, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_an_image_that_is_to_be_turned_gives_torchs_tokens_and_memories(model, runtime):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    noise(170, 60).save(file, "PNG", exif=exif)
    sample = Sample(id="x", images=(file.getvalue(),), question="which is it?", answer="")
    forced = {0: MemoryKind.SHORT, 2: MemoryKind.LONG}
    expected, reference = by_torch(model, sample, forced)
    tokens, memories = by_graphs(runtime.executor.bundle, sample, forced)
    assert tokens == expected
    for ours, theirs in zip(memories, reference, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_sampling_draws_what_the_training_engine_draws(model, runtime):
    sample = Sample(**{**tiny.samples()[0].__dict__, "id": ""})
    for seed in range(3):
        rollout = generate(model, [sample], Learned(), max_new_tokens=TOKENS, temperature=1.0, seed=seed)[0]
        chunks = runtime.generate(pictures(sample), sample.question, max_new_tokens=TOKENS, temperature=1.0, seed=seed)
        spoken = [token for token in rollout.token_ids if token != LATENT and token not in model.end_ids.values()]
        assert [chunk.token for chunk in chunks if chunk.token is not None] == spoken


def test_parity_reports_a_model_that_differs_and_does_not_raise(model, runtime, inputs):
    other = VisMemModel.from_pretrained(inputs["stage2"], inputs["base"])
    with torch.no_grad():
        other.long.memory_init.add_(1.0)
        other.backbone.head.weight[5].mul_(50)
    parity = check_parity(
        other, OnnxExecutor(runtime.executor.bundle), tiny.samples()[:2], max_new_tokens=TOKENS, tolerance=1e-4
    )
    assert parity.passed is False
    assert parity.greedy_equal < 2
    assert parity.max_memory_difference > 1e-4
    assert "torch gives" in parity.differences[0]


@pytest.mark.parametrize("other", [np.full((2, 3), np.nan), np.full((2, 3), np.inf), np.zeros((3, 3))])
def test_a_memory_that_is_not_finite_or_of_another_shape_differs_without_bound(other):
    assert memory_difference(np.zeros((2, 3)), np.ones((2, 3))) == 1.0
    assert memory_difference(np.zeros((2, 3)), other) == memory_difference(other, np.zeros((2, 3))) == np.inf


def test_left_padding_and_other_rows_adapters_change_nothing(model, bundle):
    decoder = Graph(bundle / "onnx" / "decoder.onnx", 1)
    settings = json.loads((bundle / "onnx" / "runtime.json").read_text())
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(1, 5, settings["width"])).astype(np.float32)
    layout = settings["decoder"]

    def run(rows, mask, positions, adapter):
        empty = np.zeros((len(rows), layout["kv_heads"], 0, layout["head_width"]), np.float32)
        past = {name: empty for name in decoder.inputs if name.startswith("past_")}
        return decoder(embeddings=rows, mask=mask, positions=positions, adapter=adapter, **past)

    places = np.broadcast_to(np.arange(5, dtype=np.float32), (3, 1, 5))
    alone = run(embeddings, np.ones((1, 5), np.float32), places, np.zeros(1, np.float32))
    pad = random.normal(size=(1, 3, settings["width"])).astype(np.float32)
    padded = np.concatenate([pad, embeddings], axis=1)
    rows = np.concatenate([padded, random.normal(size=padded.shape).astype(np.float32)])
    mask = np.ones((2, 8), np.float32)
    mask[0, :3] = 0
    positions = np.zeros((3, 2, 8), np.float32)
    positions[:, 0, 3:], positions[:, 1] = places[:, 0], np.arange(8)
    for other in (0.0, 1.0):
        both = run(rows, mask, positions, np.array([0.0, other], np.float32))
        np.testing.assert_allclose(both["logits"][0], alone["logits"][0], atol=1e-5)
        np.testing.assert_allclose(both["hidden"][0, 3:], alone["hidden"][0], atol=1e-5)
    on = run(embeddings, np.ones((1, 5), np.float32), places, np.ones(1, np.float32))
    assert np.abs(on["hidden"] - alone["hidden"]).max() > 1e-3  # the switch does switch


def test_grouped_keys_give_hugging_faces_hidden_states_with_an_adapter_and_without(model, tmp_path):
    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    grouped = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    decoder = Decoder(model)
    language = grouped.model.language_model
    decoder.layers, decoder.norm, decoder.heads, decoder.kv_heads = language.layers, language.norm, 4, 2
    decoder.head_dim, decoder.frequencies = 8, language.rotary_emb.inv_freq
    decoder.axes = torch.eye(3)[[0, 0, 1, 2]]
    decoder.lm_head = grouped.lm_head
    embeddings, positions = torch.randn(1, 6, 32), torch.randint(0, 9, (3, 1, 6))
    nothing = [torch.zeros(1, 2, 0, 8)] * 4
    attentions = [layer.self_attn for layer in language.layers]
    adapted = [linear for own in attentions for linear in (own.q_proj, own.v_proj)]
    targets = [LoraTarget(str(at), linear, 0, linear.out_features) for at, linear in enumerate(adapted)]
    lora = Lora(targets, LoraSettings(rank=3, alpha=4.0, dropout=0.0))
    for up in lora.up.values():
        torch.nn.init.normal_(up)
    fused = [Fused([own.q_proj, own.k_proj, own.v_proj], [lora]) for own in attentions]
    decoder.attention, decoder.slope, decoder.start = torch.nn.ModuleList(fused), torch.ones(6), torch.zeros(6)
    found = []
    for on in (False, True):
        with torch.no_grad(), lora.active(on):
            expected = language(
                inputs_embeds=embeddings, attention_mask=torch.ones(1, 6), position_ids=positions
            ).last_hidden_state
            _, hidden, _, _ = decoder(embeddings, torch.ones(1, 6), positions.float(), torch.full((1,), on), nothing)
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
        found.append(hidden)
    assert (found[0] - found[1]).abs().max() > 1e-2
    # The graph over two rows, one with the adapter; the last of the first row's three keys is padding.
    parts = [f"{part}_{layer}" for layer in range(2) for part in ("key", "value")]
    past = [torch.randn(2, 2, 3, 8) for _ in parts]
    mask = torch.ones(2, 9)
    mask[0, 2] = 0
    given = embeddings.repeat(2, 1, 1), mask, positions.float().repeat(1, 2, 1), torch.tensor([0.0, 1.0]), past
    names = "embeddings", "mask", "positions", "adapter", *(f"past_{part}" for part in parts)
    outputs = "logits", "hidden", "memory", *(f"present_{part}" for part in parts)
    (like,) = (graph for graph in graphs_of(model) if graph.name == "decoder")
    varying = *like.varying[:4], like.varying[4][:1] * len(past)
    graph = replace(like, module=decoder, arguments=given, varying=varying, inputs=names, outputs=outputs)
    with (tmp_path / WEIGHTS).open("wb") as file, torch.no_grad():
        onnx_ir.save(_exported(graph, WeightFile(file), 18), tmp_path / "decoder.onnx")
    run = Graph(tmp_path / "decoder.onnx", 1)

    def read(embeddings, mask, positions, adapter, past):
        values = zip(names, (embeddings, mask, positions, adapter, *past), strict=True)
        return run(**{name: value.numpy() for name, value in values})

    both = read(*given)
    for row, keys in enumerate(([0, 1], [0, 1, 2])):  # alone, without the padding, in torch
        own, held = slice(row, row + 1), [part[row : row + 1][:, :, keys] for part in past]
        for count in (6, 1):  # tokens
            tokens, places = given[0][own, :count], given[2][:, own, :count]
            alone = tokens, torch.ones(1, len(keys) + count), places, given[3][own], held
            with torch.no_grad():
                _, hidden, _, _ = decoder(*alone)
            np.testing.assert_allclose(read(*alone)["hidden"], hidden.numpy(), atol=1e-4)
            np.testing.assert_allclose(both["hidden"][own, :count], hidden.numpy(), atol=1e-4)
    nothing = [part[:, :, :0] for part in past]
    begun = read(given[0], torch.ones(2, 6), *given[2:4], nothing)["hidden"]
    np.testing.assert_allclose(begun, torch.cat(found).numpy(), atol=1e-4)


def test_the_policys_own_adapter_is_on_while_decoding_and_off_while_forming(tiny_base):
    trained = tiny.vismem(tiny_base)
    trained.policy_lora.enabled = True
    with torch.no_grad():
        for up in trained.policy_lora.up.values():
            up.normal_(0, 0.3)
    prompt = encode(trained.backbone, tiny.samples()[:1])
    shape = trained.backbone.model.config.text_config
    empty = torch.zeros(1, shape.num_key_value_heads, 0, shape.hidden_size // shape.num_attention_heads)
    nothing = [empty] * (2 * shape.num_hidden_layers)

    def expected():
        return trained.backbone.language(prompt.embeds, prompt.positions, causal_mask(prompt.mask))

    with torch.no_grad():
        decoding = expected()
        with trained.policy_lora.active(False), trained.long.lora.active():
            forming = expected()
        for adapter, hidden in ((0.0, decoding), (1.0, forming)):
            found = Decoder(trained)(
                prompt.embeds, prompt.mask.float(), prompt.positions.float(), torch.tensor([adapter]), nothing
            )[1]
            torch.testing.assert_close(found, hidden, atol=1e-5, rtol=1e-5)
    assert (decoding - forming).abs().max() > 1e-2


def test_the_visual_states_in_the_runtime_are_those_of_one_torch_pass(model, runtime):
    sample = tiny.samples()[0]
    prompt = encode(model.backbone, [sample])
    with torch.no_grad():
        hidden = model.backbone.language(prompt.embeds, prompt.positions, causal_mask(prompt.mask))
    graphs = OnnxExecutor(runtime.executor.bundle)
    graphs.join(Request([graphs.prepare(pictures(sample), sample.turns(), 4)], Learned(), 4), limit=3)
    np.testing.assert_allclose(graphs.hidden[0, : graphs.slots.used[0]], hidden[0].numpy(), atol=1e-5)
