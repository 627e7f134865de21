"""A bundle whose prompts are coarse: the same tokens and memories as torch, whatever the images' sizes."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
from pictures import TOKENS, by_graphs, by_torch, encoded, noise, pictures
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vismem.data.sample import write_shards
from vismem.errors import UserError
from vismem.export.export import export
from vismem.export.onnx import runtime_settings
from vismem.export.parity import check_parity, comparable
from vismem.files import write_json
from vismem.generation.onnx_executor import OnnxExecutor
from vismem.generation.prompts import encode
from vismem.models.kinds import MemoryKind
from vismem.models.vismem import VisMemModel
from vismem.runtime.bundle import Bundle
from vismem.runtime.images import coarse_grid
from vismem.runtime.limits import RequestError
from vismem.serving.answering import Runtime
from vismem.serving.golden import check_golden

LIMIT = 9 * 28**2  # pixels: an image of 84 x 84 fits


@pytest.fixture(scope="module")
def coarse(inputs, tmp_path_factory):
    folder = shutil.copytree(inputs["stage2"], tmp_path_factory.mktemp("coarse") / "stage2")
    settings = json.loads((folder / "vismem.json").read_text())
    settings["memory"]["prompt_pixels"] = LIMIT
    write_json(folder / "vismem.json", settings)
    return VisMemModel.from_pretrained(folder, inputs["base"])


@pytest.fixture(scope="module")
def coarse_bundle(bundle, model, coarse, tmp_path_factory):
    """The graphs do not depend on the maximum: only runtime.json is another."""
    folder = shutil.copytree(bundle, tmp_path_factory.mktemp("bundle") / "coarse", copy_function=os.link)
    settings = runtime_settings(coarse)
    written, expected = folder / "onnx" / "runtime.json", runtime_settings(model)
    expected["image"]["prompt_pixels"] = LIMIT
    assert settings == expected
    settings["tensors"] = json.loads(written.read_text())["tensors"]
    written.unlink()
    write_json(written, settings)
    return folder


SIZES = [(84, 84)], [(200, 90)], [(130, 60), (84, 84), (60, 190)], [(168, 168), (168, 168)]


@pytest.mark.parametrize("sizes", SIZES, ids=["fits", "large", "mixed", "two"])
def test_coarse_prompts_give_torchs_tokens_and_memories(coarse, coarse_bundle, sizes):
    images = encoded(*(noise(*size, seed) for seed, size in enumerate(sizes)))
    sample = replace(tiny.samples()[0], id="x", images=images)
    forced = {0: MemoryKind.SHORT, 2: MemoryKind.LONG, 4: MemoryKind.SHORT}
    expected, reference = by_torch(coarse, sample, forced)
    tokens, memories = by_graphs(Bundle(coarse_bundle, threads=1), sample, forced)
    assert tokens == expected
    assert len(memories) == 3
    for ours, theirs in zip(memories, reference, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_runtime_reads_torchs_pixels_to_the_bit(coarse, coarse_bundle):
    images = encoded(noise(200, 90), noise(84, 84, 1))
    sample = replace(tiny.samples()[0], images=images)
    expected = encode(coarse.backbone, [sample])
    executor = OnnxExecutor(Bundle(coarse_bundle, threads=1))
    found = executor.prepare(pictures(sample), sample.turns(), TOKENS)
    assert np.array_equal(found.whole["pixels"], expected.vision.patches[0].numpy())
    assert np.array_equal(found.prompt.visual, expected.visual[0].numpy())
    assert np.array_equal(found.prompt.positions, expected.positions[:, 0].numpy())
    assert len(found.shown["pixels"]) == 4 * found.prompt.visual.sum() < len(found.whole["pixels"])


def test_whole_and_coarse_patches_count_against_the_servers_limit(coarse_bundle):
    images = [noise(168, 168), noise(84, 84)]  # 144 and 36 patches; in the prompt 36 and 36
    allowed = Runtime.open(coarse_bundle, max_patches=252)
    assert next(allowed.generate(images, "what?")).event == "token"
    with pytest.raises(RequestError, match="the images make 252 patches: the limit is 251"):
        Runtime.open(coarse_bundle, max_patches=251).generate(images, "what?")


def test_parity_is_of_coarse_prompts_on_both_sides(coarse, model, coarse_bundle):
    samples = [replace(s, images=encoded(noise(168, 112, i))) for i, s in enumerate(tiny.samples()[:2])]
    executor = OnnxExecutor(Bundle(coarse_bundle, threads=1))
    assert check_parity(coarse, executor, samples, max_new_tokens=6, tolerance=1e-4).passed
    assert not check_parity(model, executor, samples, max_new_tokens=6, tolerance=1e-4).passed


def test_what_a_server_refuses_is_neither_compared_nor_a_golden_question(coarse, inputs, config, tmp_path, monkeypatch):
    """Of 288 patches, too many to compare; of 144 whole ones and 36 coarse ones, too many for a server; of 36."""
    shown = (168, 168), (168,), (84,)
    made = [encoded(*(noise(side, side) for side in sides)) for sides in shown]
    samples = [replace(sample, images=images) for sample, images in zip(tiny.samples(3), made, strict=True)]
    write_shards(samples, tmp_path / "validate" / "data" / "test")
    coarse.save_pretrained(tmp_path / "stage2")
    monkeypatch.setattr("vismem.export.export.MAX_PATCHES", 150)
    inputs = inputs | {name: tmp_path / name for name in ("validate", "stage2")}
    (out := tmp_path / "bundle").mkdir()
    assert "2 of 2 answers" in export(config, inputs, out)
    assert check_golden(Runtime.open(out, max_patches=150), out) == 1
    assert len(list((out / "golden").iterdir())) == 2, "the question's image and golden.json"
    with pytest.raises(UserError, match="every test question drawn for parity make more than 35 patches"):
        comparable(coarse, samples, 35)
    write_shards(samples[1:2], tmp_path / "validate" / "data" / "test")
    (none := tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="every test question drawn for parity make more than 150 patches"):
        export(config, inputs, none)


def test_a_coarse_image_has_the_size_of_the_processors_own_rule():
    for rows in range(2, 60, 2):
        for columns in range(2, 60, 6):
            for pixels in (1, 784, 9999, 50_000, 196 * rows * columns, 196 * rows * columns - 1):
                expected = smart_resize(14 * rows, 14 * columns, 28, 0, pixels)
                assert coarse_grid((rows, columns), pixels, 14, 2) == (expected[0] // 14, expected[1] // 14)
    assert coarse_grid((2, 600), 28**2 * 30, 14, 2) == (2, 188), "one that the processor's function refuses"
