"""Where memories looked: true attention weights in their places, and nothing else changes."""

import io
from dataclasses import replace

import numpy as np
import pytest
import tiny_families
import tiny_stages
import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention

from vismem.data.sample import Sample
from vismem.generation.invocation import MODES
from vismem.generation.loop import DecodeLoop, Request
from vismem.generation.torch_executor import TorchExecutor
from vismem.models.attention import Attention, Look
from vismem.models.kinds import MemoryKind
from vismem.models.memory import FormationInputs
from vismem.models.vismem import VisMemModel

SIDES = {"qwen2_5_vl": 84, "internvl": 56, "llava_onevision": 45}  # of a picture that no family resizes, in pixels


@pytest.fixture(scope="module", params=SIDES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisMemModel:
    return tiny_stages.eager_model(tiny_families.save_base(tmp_path_factory.mktemp("base"), request.param))


def decode(model: VisMemModel, sample: Sample, mode: str, looks: list[Look] | None) -> list[tuple[int, bool, float]]:
    with torch.inference_mode():
        loop = DecodeLoop(TorchExecutor(model))
        (row,) = loop.join(Request([sample], MODES[mode], max_new_tokens=12, looks=looks))
        while not row.finished:
            loop.step()
    return row.tokens


def formed(
    model: VisMemModel, sample: Sample, mode: str, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[MemoryKind, FormationInputs]]:
    """What each memory of an answer is formed from."""
    seen: list[tuple[MemoryKind, FormationInputs]] = []
    form = model.form
    with monkeypatch.context() as patch:
        patch.setattr(model, "form", lambda kind, inputs: (seen.append((kind, inputs)), form(kind, inputs))[1])
        decode(model, sample, mode, None)
    return seen


@pytest.mark.parametrize("mode", ["short", "long"])
def test_to_watch_changes_no_bit_and_gives_a_look_for_every_memory(
    model: VisMemModel, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sample in (each for each in tiny_families.samples() if each.images):
        looks: list[Look] = []
        plain = decode(model, sample, mode, None)
        assert decode(model, sample, mode, looks) == plain  # tokens and their log-probabilities
        memories = formed(model, sample, mode, monkeypatch)
        assert len(looks) == len(memories) > 0
        for kind, inputs in memories:
            with torch.inference_mode():
                alone = model.form(kind, inputs)
                with Attention():
                    assert torch.equal(model.form(kind, inputs), alone)


@pytest.mark.parametrize("mode", ["short", "long"])
def test_weights_are_those_of_the_attention_and_a_look_is_their_part_on_images(
    model: VisMemModel, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = next(each for each in tiny_families.samples() if len(each.images) > 1)
    for kind, inputs in formed(model, sample, mode, monkeypatch):
        with torch.inference_mode(), Attention() as attention:
            model.form(kind, inputs)
            assert attention.called is not None
            query, key, mask, scale = attention.called
            weights = attention.weights(query.shape[2])
            seen = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
            exact = scaled_dot_product_attention(query, key, seen, attn_mask=mask, scale=scale, enable_gqa=True)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        torch.testing.assert_close(weights, exact.mean(1))
        by_hand = (query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT) * (
            scale or query.shape[-1] ** -0.5
        )
        by_hand = by_hand.exp() * (torch.ones(()) if mask is None else mask.double())
        by_hand = (by_hand / by_hand.sum(-1, keepdim=True)).mean(1)
        torch.testing.assert_close(weights.double(), by_hand, atol=1e-6, rtol=0)
        (look,) = attention.looks(kind, inputs, model.slots_of(kind))
        assert 0 < look.share <= 1
        sums = [np.sum(grid) for grid in look.maps if grid is not None]
        if None not in look.maps:
            assert sum(sums) == pytest.approx(look.share, abs=1e-6)
        assert look.share < 1  # a memory's tokens read each other too


@pytest.mark.parametrize("mode", ["short", "long"])
def test_a_map_lies_on_the_picture(model: VisMemModel, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cell of the picture is white: what is read there is heavy there on the map."""
    if mode == "long" and not model.backbone.three_axes:
        pytest.skip("one-axis positions say nothing of rows and columns")
    side = SIDES[model.backbone.family]
    cell = 14 * (2 if mode == "long" else 1)
    white = np.zeros((side, side, 3), np.uint8)
    row, column = 1, 2
    white[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 255
    file = io.BytesIO()
    Image.fromarray(white).save(file, "PNG")
    sample = replace(next(each for each in tiny_families.samples() if each.images), images=(file.getvalue(),))
    kind, inputs = formed(model, sample, mode, monkeypatch)[0]
    with torch.inference_mode(), Attention() as attention:
        model.form(kind, inputs)
    assert attention.called is not None
    query, key, mask, _ = attention.called
    if kind is MemoryKind.SHORT:
        assert inputs.patches is not None
        place = int(inputs.patches.vision.patches[0].mean(-1).argmax())
        place += key.shape[2] - query.shape[2] - inputs.patches.vision.patches.shape[1]  # class tokens of one tile
    else:
        embeds = inputs.stream[0] - inputs.stream[0][inputs.stream_visual[0]].median(0).values
        place = int((embeds.pow(2).sum(-1) * inputs.stream_visual[0]).argmax())
    marked = torch.zeros_like(key)
    marked[:, :, place] = 50.0
    attention.called = torch.ones_like(query), marked, mask, None
    (look,) = attention.looks(kind, inputs, model.slots_of(kind))
    grid = look.maps[0]  # LLaVA shows a picture twice, as a whole and as a tile
    assert np.unravel_index(np.argmax(grid), np.shape(grid)) == (row, column)
    assert look.share == pytest.approx(1)
