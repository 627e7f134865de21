"""The exported bundle: ONNX equals torch, weights once on disk, and a runtime that needs neither torch nor VisMem."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from PIL import Image
from project import HASHES
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import vismem.serving.runtime as runtime_package
from vismem.config import Config, EvaluateConfig, ExportConfig
from vismem.data.sample import Sample, write_shards
from vismem.errors import UserError
from vismem.evaluation.metrics import summarise
from vismem.evaluation.predictions import predict
from vismem.export.export import export
from vismem.export.graphs import Decoder
from vismem.export.onnx import prompt_parts
from vismem.export.parity import check_parity, decode_runtime, decode_torch, memory_difference
from vismem.generation.engine import generate
from vismem.generation.invocation import Learned, Off
from vismem.generation.prompts import encode
from vismem.generation.types import LATENT
from vismem.models.kinds import MemoryKind
from vismem.models.memory import causal_mask
from vismem.models.vismem import VisMemModel
from vismem.provenance import verify_manifest
from vismem.records import Metrics
from vismem.serving.environment import DEFAULT_PYTHON
from vismem.serving.runtime import BundleError, RequestError, Runtime
from vismem.serving.runtime.bundle import Graph
from vismem.serving.runtime.images import cut_patches
from vismem.serving.runtime.prompt import TextStream, tokenise
from vismem.serving.runtime.runtime import Answer

TOKENS = 16


@pytest.fixture(scope="module")
def inputs(tiny_base, tmp_path_factory):
    """Outputs of the steps before export, of a tiny random model that invokes now and then."""
    root = tmp_path_factory.mktemp("steps")
    model = tiny.vismem(tiny_base)
    with torch.no_grad():
        model.tokens.head.mul_(3)
    model.save_pretrained(root / "stage2")
    samples = tiny.samples()
    write_shards(samples, root / "validate" / "data" / "test")
    answers = {
        arm: [predict(s, r) for s, r in zip(samples, generate(model, samples, policy, max_new_tokens=4), strict=True)]
        for arm, policy in (("vanilla", Off(limit=0)), ("vismem", Learned()))
    }
    figures = summarise(answers, dict.fromkeys(answers, 0.01), seed=0, resamples=100)
    Metrics(**figures, **HASHES).write(root / "evaluate")
    return {"base": tiny_base} | {name: root / name for name in ("stage2", "validate", "evaluate")}


@pytest.fixture(scope="module")
def config():
    return Config(export=ExportConfig(parity_items=6), evaluate=EvaluateConfig(max_new_tokens=TOKENS))


@pytest.fixture(scope="module")
def bundle(inputs, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle")
    (out / "leftover").mkdir()  # of a killed run
    line = export(config, inputs, out)
    assert "6 of 6 answers" in line
    return out


@pytest.fixture(scope="module")
def model(inputs):
    return VisMemModel.from_pretrained(inputs["stage2"], inputs["base"])


@pytest.fixture(scope="module")
def runtime(bundle):
    return Runtime(bundle)


def pictures(sample):
    return [Image.open(io.BytesIO(data)) for data in sample.images]


def noise(width, height, seed=0, mode="RGB"):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def encoded(*images):
    files = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    return tuple(files)


# --- ONNX equals torch ---


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
    reference = decode_torch(model, sample, forced, TOKENS)
    found = decode_runtime(model, runtime, sample, forced, TOKENS)
    assert found.tokens == reference.tokens
    assert len(found.memories) == 3
    for ours, theirs in zip(found.memories, reference.memories, strict=True):
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
    parity = check_parity(other, runtime, tiny.samples()[:2], max_new_tokens=TOKENS, tolerance=1e-4)
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


def test_grouped_keys_give_hugging_faces_hidden_states(model):
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
    decoder.query = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))  # switched off below
    decoder.value = torch.nn.ModuleList(torch.nn.Linear(32, 16) for _ in range(2))
    with torch.no_grad():
        expected = language(
            inputs_embeds=embeddings, attention_mask=torch.ones(1, 6), position_ids=positions
        ).last_hidden_state
        _, hidden, _, _ = decoder(embeddings, torch.ones(1, 6), positions.float(), torch.zeros(1), nothing)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


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


# --- the runtime's own preprocessing ---


@pytest.mark.parametrize("size", [(84, 84), (56, 200), (301, 99), (30, 28), (640, 480)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_patches_are_the_processors_bit_for_bit(model, bundle, size, mode):
    settings = json.loads((bundle / "onnx" / "runtime.json").read_text())["image"]
    images = [noise(*size, mode=mode), noise(90, 90, seed=1)]
    expected = model.backbone.processor.image_processor(
        images=[image.convert("RGB") for image in images], return_tensors="np"
    )
    patches = cut_patches(images, settings)
    assert np.array_equal(patches.values, expected["pixel_values"])
    assert [(1, *grid) for grid in patches.grids] == [tuple(grid) for grid in expected["image_grid_thw"].tolist()]


def test_ids_positions_and_windows_are_those_of_the_torch_side(model, bundle):
    settings = json.loads((bundle / "onnx" / "runtime.json").read_text())
    images = [noise(84, 84), noise(170, 60, 1), noise(112, 140, 2)]
    sample = Sample(id="x", images=encoded(*images), question="  Zählt: <|im_end|> 3\n", answer="")
    expected = encode(model.backbone, [sample])
    patches = cut_patches(images, settings["image"])
    prompt = tokenise(Runtime(bundle).bundle.tokenizer, settings, sample.question, patches.grids)
    assert np.array_equal(prompt.positions, expected.positions[:, 0].numpy())
    assert np.array_equal(prompt.visual, expected.visual[0].numpy())
    assert prompt.next_position == int(expected.next_position())
    text = expected.embeds[0][~expected.visual[0]]
    assert torch.equal(model.embed(torch.tensor(prompt.ids))[~expected.visual[0]], text)
    for ours, theirs in ((patches.window_ids, expected.vision.window), (patches.image_ids, expected.vision.image)):
        same = theirs[0, :, None] == theirs[0, None]
        assert np.array_equal(ours[:, None] == ours[None], same.numpy())


def test_pieces_of_text_join_to_the_decoded_text_and_never_split_a_character(model, runtime):
    tokenizer = runtime.bundle.tokenizer
    text = "naïve 色 🙂, e\u0301 and <|im_end|> more"
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.finish() == model.backbone.processor.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)
    cut = TextStream(tokenizer)
    given = [cut.add(token) for token in tokenizer.encode("🙂").ids[:-1]]
    assert given == [""] * len(given)
    assert cut.finish() == "\ufffd"


def test_a_template_that_puts_the_question_first_is_refused():
    class Processor:
        def apply_chat_template(self, messages, **_):
            parts = reversed(messages[0]["content"])
            return "".join(part.get("text", "<|image_pad|>") for part in parts)

    with pytest.raises(UserError, match="chat template"):
        prompt_parts(Processor())


# --- files ---


def test_every_weight_lies_on_disk_once(bundle, model):
    places, sizes, used = {}, {}, {}
    data = (bundle / "onnx" / "weights.bin").read_bytes()
    for file in sorted((bundle / "onnx").glob("*.onnx")):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            entry = {item.key: item.value for item in tensor.external_data}
            if entry:
                offset, length = int(entry["offset"]), int(entry["length"])
                places.setdefault(data[offset : offset + length], set()).add(offset)
                sizes[offset] = length
                used.setdefault(offset, set()).add(file.name)
    assert all(len(offsets) == 1 for offsets in places.values())
    assert any(names == {"vision.onnx", "short.onnx"} for names in used.values())
    base = sum(parameter.nbytes for parameter in model.backbone.model.parameters())
    added = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("policy_lora"))
    assert sum(sizes.values()) <= len(data) <= (base + added) * 1.01 + 64 * len(sizes)


def test_graphs_hold_no_trace_of_the_machine_that_wrote_them(bundle):
    for file in (bundle / "onnx").glob("*.onnx"):
        content = file.read_bytes()
        for trace in (b".py", b"site-packages", str(Path.cwd()).encode(), b"stack_trace", b"pkg.torch"):
            assert trace not in content, (file.name, trace)


def test_the_bundle_explains_itself(bundle, inputs):
    assert verify_manifest(bundle) == []
    assert not (bundle / "leftover").exists()
    lineage = json.loads((bundle / "lineage.json").read_text())
    assert lineage["params"]["export"]["parity_items"] == 6
    assert set(lineage["files"]) >= {"onnx/weights.bin", "vismem/memory.safetensors", "README.md", "parity.json"}
    card = (bundle / "README.md").read_text()
    metrics = json.loads((inputs["evaluate"] / "metrics.json").read_text())
    assert f"{metrics['arms']['vismem']['overall']:.1f} (" in card
    assert lineage["git"]["commit"] in card
    for text in (card, json.dumps(lineage)):
        assert str(inputs["base"].parent) not in text
    again = VisMemModel.from_pretrained(bundle / "vismem", inputs["base"])
    trained = VisMemModel.from_pretrained(inputs["stage2"], inputs["base"])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trained.parameters(), strict=True))


def test_missing_metrics_are_named(inputs, config, tmp_path):
    with pytest.raises(UserError, match=r"metrics\.json.*vismem evaluate"):
        export(config, inputs | {"evaluate": tmp_path}, tmp_path)


def test_a_damaged_or_missing_file_is_refused(bundle, tmp_path):
    broken = tmp_path / "bundle"
    shutil.copytree(bundle, broken)
    weights = broken / "onnx" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin is damaged"):
        Runtime(broken)
    weights.unlink()
    with pytest.raises(BundleError, match=r"weights\.bin is missing"):
        Runtime(broken)
    with pytest.raises(BundleError, match="no exported bundle"):
        Runtime(tmp_path)


ALONE = """
import pathlib, sys
for name in ("torch", "transformers", "vismem"):
    sys.modules[name] = None
from PIL import Image
from alone import Runtime
folder, bundle, question = sys.argv[1:]
images = [Image.open(file) for file in sorted(pathlib.Path(folder).glob("*.png"))]
answer = Runtime(bundle).generate(images, question, max_new_tokens=8, force={2: "short"})
print([chunk.token for chunk in answer])
"""


@pytest.mark.parametrize("python", [Path(sys.executable), DEFAULT_PYTHON], ids=["ours", "serving, numpy 1"])
def test_the_runtime_works_where_torch_transformers_and_vismem_cannot_be_imported(python, bundle, runtime, tmp_path):
    if not python.is_file():
        pytest.skip("no serving environment: `make serving`")
    sample = tiny.samples()[0]
    shutil.copytree(Path(runtime_package.__file__).parent, tmp_path / "alone")
    for number, data in enumerate(sample.images):
        (tmp_path / f"{number}.png").write_bytes(data)
    command = [str(python), "-c", ALONE, str(tmp_path), str(bundle), sample.question]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here = runtime.generate(pictures(sample), sample.question, max_new_tokens=8, force={2: "short"})
    assert done.stdout.strip() == str([chunk.token for chunk in here])


# --- answering ---


def test_chunks_tell_the_answer_piece_by_piece(model, runtime):
    sample = tiny.samples()[1]
    force = {1: "long", 3: "short"}
    chunks = list(runtime.generate(pictures(sample), sample.question, max_new_tokens=6, memory=False, force=force))
    assert [c.event for c in chunks[:4]] == ["token", "long", "token", "short"]
    assert chunks[-1].event == "end"
    assert [c.memory.shape for c in chunks if c.memory is not None] == [(6, 32), (4, 32)]
    words = [c.token for c in chunks if c.event == "token"]
    assert len(words) == 6 or words[-1] in model.stop_ids
    assert "".join(c.text for c in chunks) == model.backbone.processor.decode(words, skip_special_tokens=True)


def test_without_memory_nothing_is_invoked_and_torch_says_the_same(model, runtime):
    sample = tiny.samples()[2]
    chunks = list(runtime.generate(pictures(sample), sample.question, max_new_tokens=TOKENS, memory=False))
    assert {chunk.event for chunk in chunks} == {"token", "end"}
    expected = generate(model, [sample], Off(), max_new_tokens=TOKENS)[0].token_ids
    assert tuple(chunk.token for chunk in chunks[:-1]) == expected


def test_no_more_memories_are_invoked_than_an_answer_may_have(model, runtime):
    sample = tiny.samples()[3]
    force = dict.fromkeys(range(10), "short")
    chunks = list(runtime.generate(pictures(sample), sample.question, max_new_tokens=4, force=force))
    assert sum(chunk.event == "short" for chunk in chunks) == model.invocation_config.max_per_answer == 3


def test_closing_the_iterator_ends_the_answer(runtime, monkeypatch):
    sample = tiny.samples()[0]
    chunks = runtime.generate(pictures(sample), sample.question, max_new_tokens=TOKENS, memory=False)
    next(chunks)
    calls = []
    monkeypatch.setattr(runtime.bundle, "decoder", lambda **values: calls.append(values))
    chunks.close()
    assert list(chunks) == []
    assert calls == []


def test_requests_that_cannot_be_answered_are_refused_before_any_work(runtime):
    image = noise(84, 84)
    for images, prompt, options, reason in (
        ([], "what?", {}, "no image"),
        ([image], "<|image_pad|>", {}, "must not contain"),
        ([image], "what?", {"max_new_tokens": 0}, "at least 1"),
        ([image], "what?", {"max_new_tokens": 10**6}, "positions"),
        ([image.resize((2010, 10))], "what?", {}, "200 times"),
    ):
        with pytest.raises(RequestError, match=reason):
            runtime.generate(images, prompt, **options)


def test_the_visual_states_in_the_runtime_are_those_of_one_torch_pass(model, runtime):
    sample = tiny.samples()[0]
    prompt = encode(model.backbone, [sample])
    with torch.no_grad():
        hidden = model.backbone.language(prompt.embeds, prompt.positions, causal_mask(prompt.mask))
    answer = Answer(runtime.bundle, pictures(sample), sample.question, 4)
    answer._prefill()
    np.testing.assert_allclose(answer.hidden[: answer.used], hidden[0].numpy(), atol=1e-5)
