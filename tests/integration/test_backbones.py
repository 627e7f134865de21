"""Every supported family against Hugging Face's own model of it, and under the engine's invariants."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_families as families
import torch
from PIL import Image
from replayed import assert_replayed
from torch import Tensor

from vismem.config import Config
from vismem.data.collate import prompt_messages
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.generation.engine import generate
from vismem.generation.invocation import Off, Random
from vismem.generation.prompts import encode
from vismem.generation.replay import prefill, score
from vismem.models.backbones import backbone_of
from vismem.models.backbones.base import Backbone, VisionInput
from vismem.models.backbones.tiles import TiledBackbone
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base
from vismem.models.memory import OWN
from vismem.models.vismem import VisMemModel
from vismem.training.base import base as copy_base

RANDOM = Random(probability=0.7, anywhere=0.3)


@pytest.fixture(scope="module", params=families.VARIANTS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(base: Path) -> VisMemModel:
    return tiny.vismem(base)


def _inputs(backbone: Backbone, sample: Sample) -> Any:
    """What Hugging Face's model takes for the sample."""
    text = backbone.processor.apply_chat_template(prompt_messages(sample), tokenize=False, add_generation_prompt=True)
    images: Any = families.pictures(sample)
    if isinstance(backbone, TiledBackbone):
        images = [images]
    if sample.videos:
        return families.video_inputs(backbone.processor, text, images, sample.videos)
    return backbone.processor(text=[text], images=images if sample.images else None, return_tensors="pt")


def _their_features(backbone: Backbone, sample: Sample) -> Tensor:
    every = _inputs(backbone, sample)
    features: list[Tensor] = []
    for kind, names in PIXELS.items():
        inputs = {name: every[name] for name in names if name in every}
        if inputs:
            with torch.no_grad():
                found = getattr(backbone.model, f"get_{kind}_features")(**inputs).pooler_output
            features += found if isinstance(found, tuple | list) else [found]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


PIXELS = {
    "image": ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


@pytest.fixture(scope="module")
def asked(model: VisMemModel) -> tuple[Sample, ...]:
    """The questions that the family can be asked."""
    return families.samples() + (families.video_samples() if model.backbone.takes_video else ())


@pytest.fixture(scope="module")
def seeing(asked: tuple[Sample, ...]) -> list[Sample]:
    return [s for s in asked if s.images or s.videos]


def test_image_and_video_features_equal_hugging_face(model: VisMemModel, seeing: list[Sample]) -> None:
    prompt = encode(model.backbone, seeing)
    for row, sample in enumerate(seeing):
        expected = _their_features(model.backbone, sample)
        torch.testing.assert_close(prompt.embeds[row][prompt.visual[row]], expected, atol=1e-5, rtol=1e-4)


def test_patches_in_merge_order_go_through_the_projector_as_in_hugging_face(
    model: VisMemModel, seeing: list[Sample]
) -> None:
    """So a memory's g vectors are merged exactly as g patches are."""
    backbone, prompt = model.backbone, encode(model.backbone, seeing)
    stream = backbone.patch_stream(prompt.vision)
    for row, sample in enumerate(seeing):
        ours = stream.features[row][prompt.vision.mask[row, :: backbone.merge]]
        theirs = _their_features(backbone, sample)
        if backbone.family == "llava_onevision":  # packing drops padding and adds line ends: the base view comes first
            ours, theirs = ours[:9], theirs[:9]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_an_appended_memory_reads_all_patches_and_leaves_them_as_they_are(
    model: VisMemModel, seeing: list[Sample]
) -> None:
    """Against one dense pass over patches and memory together, with a mask."""
    backbone, prompt = model.backbone, encode(model.backbone, seeing)
    stream = backbone.patch_stream(prompt.vision)
    length = 2 * backbone.merge
    tokens = torch.randn(len(seeing), length, backbone.vision_width, generator=torch.Generator().manual_seed(1))
    nowhere = torch.full((*tokens.shape[:2], 2), -1.0)
    memory = backbone.memory_stream(tokens, nowhere, stream, torch.arange(len(seeing)))
    for row in range(len(seeing)):
        real = prompt.vision.mask[row]
        alone = VisionInput(
            prompt.vision.patches[row : row + 1, real],
            prompt.vision.positions[row : row + 1, real],
            prompt.vision.image[row : row + 1, real],
            prompt.vision.window[row : row + 1, real],
        )
        patches, expected = _dense(backbone, alone, tokens[row : row + 1])
        features = stream.features[row, real[:: backbone.merge]]
        torch.testing.assert_close(features, backbone.project(patches[None])[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(memory[row], expected, atol=1e-5, rtol=1e-4)


def _dense(backbone: Any, vision: VisionInput, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One sample's patches and memory tokens as one sequence: (P, w) and (T, w) as the projector takes them."""
    length = tokens.shape[1]
    if not isinstance(backbone, TiledBackbone):
        start, group, window = backbone.patch_stream(vision).embeds, vision.image[0], vision.window[0]
        none = torch.full((1, length, 2), -1.0)
        rotary = backbone._rotary(torch.cat([vision.positions.float(), none], dim=1))
        hidden = torch.cat([start, tokens], dim=1)
        for index, block in enumerate(backbone.visual.blocks):
            full = index in backbone.settings.fullatt_block_indexes
            mask = _mask(group if full else window, length, full)
            query, key, value = backbone._qkv(block, hidden, rotary)
            attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            hidden = backbone._rest(block, hidden, attended)
        return hidden[0, :-length], hidden[0, -length:]
    tiles = int(vision.image.max()) + 1
    start = backbone._embed(vision.patches.view(tiles, -1, vision.patches.shape[-1]))
    extra = start.shape[1] - vision.image.shape[1] // tiles
    group = torch.arange(tiles).repeat_interleave(start.shape[1])
    hidden = torch.cat([start.flatten(0, 1)[None], tokens], dim=1)
    mask, states = _mask(group, length, True), [hidden]
    for block in getattr(backbone.tower.encoder, backbone.layers_name):  # Hugging Face's own attention and feed-forward
        if backbone.family == "internvl":
            attended = block.attention(block.layernorm_before(hidden), attention_mask=mask)[0]
            hidden = hidden + block.lambda_1 * attended
            hidden = hidden + block.lambda_2 * block.mlp(block.layernorm_after(hidden))
        else:
            hidden = block(hidden, attention_mask=mask)
        states.append(hidden)
    layers = backbone.model.config.vision_feature_layer
    last = torch.cat([states[i] for i in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    patches = last[0, :-length].view(tiles, -1, last.shape[-1])[:, extra:].flatten(0, 1)
    return patches, last[0, -length:]


def _mask(group: Tensor, memory: int, read: bool) -> Tensor:
    """(1, 1, T, T) True within a group and among memory tokens; memory reads every patch where `read`."""
    patches = len(group)
    mask = torch.zeros(patches + memory, patches + memory, dtype=torch.bool)
    mask[:patches, :patches] = group[:, None] == group[None]
    mask[patches:, patches:] = True
    mask[patches:, :patches] = read
    return mask[None, None]


def test_as_many_memory_tokens_as_image_tokens_start_as_the_patches_themselves(base: Path) -> None:
    sample = families.samples()[0]
    backbone = load_base(base)
    tokens = encode(backbone, [sample]).vision.mask.shape[1] // backbone.merge
    model = tiny.vismem(base, tiny.MEMORY.model_copy(update={"short_length": tokens}))
    stream = model.backbone.patch_stream(encode(model.backbone, [sample]).vision)
    real = stream.vision.mask[:, :: backbone.merge]
    with torch.no_grad():
        model.short.wanted.weight.zero_()
        weight = model.short.look(
            torch.ones(1, 4, backbone.width), torch.ones(1, backbone.width), stream.features, real
        )
    assert not weight[0].tril(-1).any(), "what earlier slots have taken"
    slot, later = torch.triu_indices(tokens, tokens, 1)
    apart = weight[0].diagonal()[slot] / weight[0, slot, later]
    torch.testing.assert_close(apart, torch.full_like(apart, math.exp(OWN)))


def test_with_invocation_off_the_text_equals_hugging_face_generate(
    model: VisMemModel, asked: tuple[Sample, ...]
) -> None:
    rollouts = generate(model, asked, Off(), max_new_tokens=12)
    assert len({r.token_ids for r in rollouts}) > len(rollouts) / 2
    for sample, rollout in zip(asked, rollouts, strict=True):
        inputs = _inputs(model.backbone, sample)
        output = model.backbone.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        expected = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(rollout.token_ids) == expected[: len(rollout.token_ids)]


def test_a_row_with_memories_is_the_same_alone_and_among_others(model: VisMemModel, asked: tuple[Sample, ...]) -> None:
    together = generate(model, asked, RANDOM, max_new_tokens=8, temperature=1.0, seed=3)
    assert {i.kind for r in together for i in r.invocations} == set(MemoryKind)
    for sample, expected in zip(asked, together, strict=True):
        alone = generate(model, [sample], RANDOM, max_new_tokens=8, temperature=1.0, seed=3)[0]
        assert alone.token_ids == expected.token_ids
        assert alone.invocations == expected.invocations
        assert alone.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_replay_scores_what_decoding_scored_and_the_gradient_reaches_every_part_of_both_formers(
    model: VisMemModel, asked: tuple[Sample, ...]
) -> None:
    rollouts = generate(model, asked, RANDOM, max_new_tokens=8, temperature=1.0, seed=5)
    assert {i.kind for r in rollouts for i in r.invocations} == set(MemoryKind)
    scores = score(model, prefill(model, asked), rollouts, torch.arange(len(rollouts)))
    assert_replayed(model, rollouts, scores)
    assert all(weight.grad is None for weight in model.backbone.model.parameters())


def test_a_saved_model_answers_as_before(
    model: VisMemModel, asked: tuple[Sample, ...], base: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    again = VisMemModel.from_pretrained(tmp_path / "model", base)
    first = generate(model, asked, RANDOM, max_new_tokens=8)
    second = generate(again, asked, RANDOM, max_new_tokens=8)
    assert [dataclasses.asdict(r) for r in first] == [dataclasses.asdict(r) for r in second]


def test_the_step_base_copies_a_model_with_its_processor(
    model: VisMemModel, seeing: list[Sample], base: Path, tmp_path: Path
) -> None:
    copy_base(Config.model_validate({"base": {"model": str(base), "dtype": "float32"}}), {}, tmp_path)
    first = generate(model, seeing, Off(), max_new_tokens=4)
    assert generate(tiny.vismem(tmp_path), seeing, Off(), max_new_tokens=4) == first


def test_a_checkpoint_with_a_video_processor_loads(tmp_path: Path) -> None:
    for variant in ("internvl", "llava_onevision"):
        folder = families.save_base(tmp_path / variant, variant)
        file = folder / "processor_config.json"
        settings = json.loads(file.read_text()) | {"video_processor": {"video_processor_type": "SomeVideoProcessor"}}
        file.write_text(json.dumps(settings))
        assert load_base(folder).processor.tokenizer is not None


def test_an_unsupported_family_is_refused_by_name_with_those_that_are_supported(tmp_path: Path) -> None:
    expected = "'llava' is not supported; supported: internvl, llava_onevision, qwen2_5_vl"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(UserError, match=expected):
        load_base(tmp_path)
    with pytest.raises(UserError, match=expected):
        backbone_of(SimpleNamespace(config=SimpleNamespace(model_type="llava")), None)


@pytest.mark.parametrize(
    ("variant", "part", "change", "message"),
    [
        ("internvl", None, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'default'"),
        ("internvl", "text_config", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ("llava_onevision", "vision_config", {"model_type": "clip_vision_model"}, "SigLIP"),
    ],
)
def test_a_model_that_would_be_read_wrongly_is_refused(
    tmp_path: Path, variant: str, part: str | None, change: dict[str, Any], message: str
) -> None:
    backbone = load_base(families.save_base(tmp_path, variant))
    settings = backbone.model.config if part is None else getattr(backbone.model.config, part)
    for key, value in change.items():
        object.__setattr__(settings, key, value)
    with pytest.raises(UserError, match=message):
        backbone_of(backbone.model, backbone.processor)


@pytest.mark.parametrize(
    "sizes", [[(56, 84)] * 3, [(50, 84)] * 3, [(56, 84), (84, 56)]], ids=["fit", "resized", "mixed"]
)
def test_pictures_get_the_pixels_that_the_processor_gives_each(
    sizes: list[tuple[int, int]], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of one fitting size go through the processor as one."""
    backbone: Any = load_base(tiny_base)
    noise = torch.Generator().manual_seed(0)
    shapes = [(height, width, 3) for width, height in sizes]
    images = [Image.fromarray(torch.randint(256, s, generator=noise, dtype=torch.uint8).numpy()) for s in shapes]
    processor = backbone.processor.image_processor
    monkeypatch.setattr(processor, "size", {"shortest_edge": 28**2, "longest_edge": 112**2})
    assert backbone.patches.fit(images) == (sizes == [(56, 84)] * 3)
    for image, (patches, grid) in zip(images, backbone.patches.images(images), strict=True):
        expected = processor(images=[image], return_tensors="pt")
        assert torch.equal(patches, expected["pixel_values"])
        assert list(grid) == expected["image_grid_thw"][0].tolist()
