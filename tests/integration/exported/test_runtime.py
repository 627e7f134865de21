"""The runtime: its preprocessing is the processor's, it needs no torch, and its answers end well."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pictures import TOKENS, by_graphs, by_torch, encoded, noise, pictures
from PIL import Image, ImageFile

from vismem.data.sample import Sample
from vismem.generation.engine import generate
from vismem.generation.invocation import Off
from vismem.generation.loop import Asked
from vismem.generation.onnx_executor import OnnxExecutor
from vismem.generation.prompts import encode
from vismem.generation.torch_executor import TorchExecutor
from vismem.generation.types import LATENT
from vismem.models.kinds import MemoryKind
from vismem.runtime.images import cut_patches, decoded, grid_of, resized
from vismem.runtime.limits import RequestError
from vismem.runtime.prompt import TextStream, tokenise
from vismem.serving.answering import Runtime
from vismem.serving.environment import DEFAULT_PYTHON
from vismem.serving.repository import copy_library


@pytest.mark.parametrize("size", [(84, 84), (56, 200), (301, 99), (30, 28), (640, 480)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_patches_are_the_processors_bit_for_bit(model, bundle, size, mode):
    settings = json.loads((bundle / "onnx" / "runtime.json").read_text())["image"]
    images = [noise(*size, mode=mode), noise(90, 90, seed=1)]
    expected = model.backbone.processor.image_processor(
        images=[image.convert("RGB") for image in images], return_tensors="np"
    )
    grids = [grid_of(image.size, settings, "") for image in images]
    patches = cut_patches(resized(decoded(images), grids, settings), grids, settings)
    assert np.array_equal(patches["pixels"], expected["pixel_values"])
    assert [(1, *grid) for grid in grids] == [tuple(grid) for grid in expected["image_grid_thw"].tolist()]


def test_ids_positions_and_windows_are_those_of_the_torch_side(model, bundle, runtime):
    settings = json.loads((bundle / "onnx" / "runtime.json").read_text())
    images = [noise(84, 84), noise(170, 60, 1), noise(112, 140, 2)]
    sample = Sample(id="x", images=encoded(*images), question="  Zählt: < |im_end| > 3\n", answer="")
    expected = encode(model.backbone, [sample])
    grids = [grid_of(image.size, settings["image"], "") for image in images]
    patches = cut_patches(resized(images, grids, settings["image"]), grids, settings["image"])
    prompt = tokenise(runtime.executor.bundle.tokenizer, settings, sample.turns(), grids)
    assert np.array_equal(prompt.positions, expected.positions[:, 0].numpy())
    assert np.array_equal(prompt.visual, expected.visual[0].numpy())
    assert prompt.positions.max() + 1 == int(expected.next_position())
    text = expected.embeds[0][~expected.visual[0]]
    assert torch.equal(model.embed(torch.tensor(prompt.ids))[~expected.visual[0]], text)
    for ours, theirs in ((patches["windows"], expected.vision.window), (patches["images"], expected.vision.image)):
        same = theirs[0, :, None] == theirs[0, None]
        assert np.array_equal(ours[:, None] == ours[None], same.numpy())


def test_a_question_that_holds_any_of_the_models_own_tokens_is_refused_before_any_graph_runs(runtime, monkeypatch):
    monkeypatch.setattr(runtime.executor.bundle, "vision", None)
    monkeypatch.setattr(runtime.executor.bundle, "decoder", None)
    added = {token.content for token in runtime.executor.bundle.tokenizer.get_added_tokens_decoder().values()}
    assert added >= {"<m_I^s>", "<m_E^l>", "<|image_pad|>", "<|video_pad|>", "<|im_end|>"}
    for token in sorted(added):
        with pytest.raises(RequestError, match=f"PROMPT holds {re.escape(token)}, one of the model's own tokens"):
            runtime.generate([noise(84, 84)], f"which {token} is it?")


def test_an_image_that_ends_too_early_is_refused_before_any_graph_runs(runtime, monkeypatch):
    monkeypatch.setattr(runtime.executor.bundle, "vision", None)
    whole, cut = encoded(noise(84, 84), noise(300, 200))
    images = [Image.open(io.BytesIO(data)) for data in (whole, cut[:-40_000])]
    with pytest.raises(RequestError, match=r"image 2 of 2 does not decode: image file is truncated"):
        runtime.generate(images, "what?")


def test_a_request_beyond_the_models_positions_is_refused_before_its_images_are_decoded(runtime, monkeypatch):
    images = [Image.open(io.BytesIO(data)) for data in encoded(noise(300, 200))]
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(RequestError, match="positions"):
        runtime.generate(images, "what?", max_new_tokens=5000)


def test_more_patches_than_the_server_allows_are_refused_before_the_images_are_decoded(bundle, monkeypatch):
    images = [Image.open(io.BytesIO(data)) for data in encoded(noise(168, 168)) * 2]
    allowed = Runtime.open(bundle, max_patches=287)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(RequestError, match="the images make 288 patches: the limit is 287"):
        allowed.generate(images, "what?")


def test_pieces_of_text_join_to_the_decoded_text_and_never_split_a_character(model, runtime):
    tokenizer = runtime.executor.bundle.tokenizer
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


ALONE = """
import pathlib, sys
for name in ("torch", "transformers", "pydantic"):
    sys.modules[name] = None
from PIL import Image, ImageFile
from vismem.serving.answering import Busy, Runtime
folder, bundle, question = sys.argv[1:]
images = [Image.open(file) for file in sorted(pathlib.Path(folder).glob("*.png"))]
answer = Runtime.open(bundle).generate(images, question, max_new_tokens=8)
print([chunk.token for chunk in answer])
"""


@pytest.mark.parametrize("python", [Path(sys.executable), DEFAULT_PYTHON], ids=["ours", "serving, numpy 1"])
def test_the_runtime_works_by_what_a_server_gets_of_vismem_alone_and_without_torch(python, bundle, runtime, tmp_path):
    if not python.is_file():
        pytest.skip("no serving environment: `make serving`")
    sample = tiny.samples()[0]
    copy_library(tmp_path)
    for number, data in enumerate(sample.images):
        (tmp_path / f"{number}.png").write_bytes(data)
    command = [str(python), "-c", ALONE, str(tmp_path), str(bundle), sample.question]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here = runtime.generate(pictures(sample), sample.question, max_new_tokens=8)
    assert done.stdout.strip() == str([chunk.token for chunk in here])


def test_chunks_tell_the_answer_piece_by_piece(model, runtime):
    invoked = 0
    for sample in tiny.samples():
        chunks = list(runtime.generate(pictures(sample), sample.question, max_new_tokens=TOKENS))
        hidden = {LATENT, *model.end_ids.values()}
        expected = [token for token in by_torch(model, sample)[0] if token not in hidden]
        assert [chunk.token for chunk in chunks[:-1]] == expected
        kinds = {token: kind.value for kind, token in model.invoke_ids.items()}
        assert [chunk.event for chunk in chunks] == [*(kinds.get(token, "token") for token in expected), "end"]
        assert "".join(c.text for c in chunks) == model.backbone.processor.decode(expected, skip_special_tokens=True)
        invoked += len(kinds.keys() & expected)
    assert invoked


def test_without_memory_nothing_is_invoked_and_torch_says_the_same(model, runtime):
    sample = tiny.samples()[2]
    chunks = list(runtime.generate(pictures(sample), sample.question, max_new_tokens=TOKENS, memory=False))
    assert {chunk.event for chunk in chunks} == {"token", "end"}
    expected = generate(model, [sample], Off(), max_new_tokens=TOKENS)[0].token_ids
    assert tuple(chunk.token for chunk in chunks[:-1]) == expected


@pytest.mark.parametrize("cold", [1e-6, 1e-40, 1e-300])
def test_a_temperature_that_would_leave_float32_is_greedy(model, runtime, cold):
    sample, torch_s = tiny.samples()[0], Runtime(TorchExecutor(model))
    for served in (runtime, torch_s):
        greedy, colder = (
            list(served.generate(pictures(sample), sample.question, max_new_tokens=9, temperature=temperature, seed=3))
            for temperature in (0.0, cold)
        )
        assert colder == greedy
    torch_s.close()


def test_the_bases_own_columns_of_memory_tokens_never_win(model, runtime, monkeypatch):
    own = list(model.memory_ids)
    assert max(own) < model.vocabulary, "as in real Qwen's head, which is padded"
    decoder = runtime.executor.bundle.decoder

    def fed(**given):
        out = decoder(**given)
        out["logits"][:, own] = 1e3
        return out

    for sample in tiny.samples()[:3]:
        for options in ({}, {"temperature": 1.0}, {"memory": False}):
            given = pictures(sample), sample.question
            expected = [chunk.token for chunk in runtime.generate(*given, max_new_tokens=TOKENS, **options)]
            given = pictures(sample), sample.question
            with monkeypatch.context() as patch:
                patch.setattr(runtime.executor.bundle, "decoder", fed)
                found = [chunk.token for chunk in runtime.generate(*given, max_new_tokens=TOKENS, **options)]
            assert found == expected


def test_no_more_memories_are_invoked_than_an_answer_may_have(model, runtime):
    forced = dict.fromkeys(range(10), MemoryKind.SHORT)
    tokens, memories = by_graphs(runtime.executor.bundle, tiny.samples()[3], forced)
    assert len(memories) == model.invocation_config.max_per_answer == 3
    assert tokens == by_torch(model, tiny.samples()[3], forced)[0]


def test_the_graphs_executor_draws_what_torch_s_draws(model, runtime, monkeypatch):
    count, words = 200, model.vocabulary
    logits = 2 * torch.randn(count, words + 2, generator=torch.Generator().manual_seed(2))
    logits[:, words:] += 4
    uniform, odd = (np.arange(count) + 0.5) / count, np.arange(count) % 2 == 1
    temperature, forced = np.where(np.arange(count) % 4 < 2, 0.8, 0.0), np.where(np.arange(count) % 50 == 7, 1, -1)
    barred, standing = np.tile([False, True], (count, 1)) & (uniform[:, None] > 0.8), np.tile([1, 0], (count, 1))
    asked = Asked(temperature, uniform, barred, odd, standing, forced)
    graphs = OnnxExecutor(runtime.executor.bundle)
    graphs.logits = list(logits.numpy())
    reference = TorchExecutor(model)
    own = list(model.memory_ids)  # barred in `VisMemModel.logits`
    monkeypatch.setattr(model, "logits", lambda last: logits.clone().index_fill_(1, torch.tensor(own), -torch.inf))
    found, expected = graphs.choose(asked), reference.choose(asked)
    assert found[0] == expected[0]
    finite = np.isfinite(expected[1])
    assert np.allclose(np.array(found[1])[finite], np.array(expected[1])[finite], atol=1e-5)
    assert finite.sum() > count / 2


def test_requests_that_cannot_be_answered_are_refused_before_any_work(runtime):
    image = noise(84, 84)
    for images, prompt, options, reason in (
        ([], "what?", {}, "no image"),
        ([image], "what?", {"max_new_tokens": 0}, "at least 1"),
        ([image], "what?", {"max_new_tokens": 10**6}, "positions"),
        ([image.resize((2010, 10))], "what?", {}, "200 times"),
    ):
        with pytest.raises(RequestError, match=reason):
            runtime.generate(images, prompt, **options)
