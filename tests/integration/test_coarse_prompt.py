"""A coarse prompt (`memory.prompt_pixels`) on every family: what the prompt shows, and what memories read."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families as families
import torch
from PIL import Image
from replayed import assert_replayed
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vismem.data.collate import prompt_messages
from vismem.data.sample import Sample, Video
from vismem.evaluation.arms import ARMS
from vismem.generation.controls import FullResolution, Relook
from vismem.generation.engine import generate
from vismem.generation.invocation import Off, Random
from vismem.generation.prompts import encode, prompt_text, shown_again
from vismem.generation.replay import prefill, score
from vismem.generation.types import LATENT
from vismem.models.backbones.base import Backbone, Prompt
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel

RANDOM = Random(probability=0.7, anywhere=0.3)
LIMITS = {"qwen2_5_vl": 9 * 28**2, "internvl": 3 * 56**2, "llava_onevision": 2 * 45**2}  # some images fit, some do not


def limited(base: Path, pixels: int | None) -> VisMemModel:
    return tiny.vismem(base, tiny.MEMORY.model_copy(update={"prompt_pixels": pixels}))


@pytest.fixture(scope="module", params=tuple(LIMITS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def fine(base: Path) -> VisMemModel:
    """Without a maximum."""
    return limited(base, None)


@pytest.fixture(scope="module")
def coarse(base: Path, fine: VisMemModel) -> VisMemModel:
    return limited(base, LIMITS[fine.backbone.family])


def asked(model: VisMemModel) -> tuple[Sample, ...]:
    """Of one image, of two of different sizes, of none; and videos where the family takes them."""
    return families.samples() + (families.video_samples() if model.backbone.takes_video else ())


def tensors(prompt: Prompt) -> dict[str, Tensor]:
    fields = {name: value for name, value in vars(prompt).items() if name != "vision"}
    return fields | vars(prompt.vision)


def assert_same(found: Prompt, expected: Prompt, *, vision: bool = True) -> None:
    names = set(vars(expected.vision))
    for name, value in tensors(expected).items():
        if vision or name not in names:
            assert torch.equal(tensors(found)[name], value), name


# --- the prompt ---


def test_a_maximum_that_no_image_exceeds_changes_nothing(base: Path, fine: VisMemModel) -> None:
    roomy = limited(base, 10**6)
    assert_same(encode(roomy.backbone, asked(fine)), encode(fine.backbone, asked(fine)))
    assert generate(roomy, asked(fine), RANDOM, max_new_tokens=6) == generate(
        fine, asked(fine), RANDOM, max_new_tokens=6
    )


def test_the_prompt_has_fewer_visual_tokens_and_the_same_text_while_memories_read_whole_images(
    fine: VisMemModel, coarse: VisMemModel
) -> None:
    whole, shown = encode(fine.backbone, asked(fine)), encode(coarse.backbone, asked(fine))
    assert vars(whole.vision).keys() == vars(shown.vision).keys()
    for name, value in vars(whole.vision).items():
        assert torch.equal(getattr(shown.vision, name), value), name
    counts = [prompt.visual.sum(1).tolist() for prompt in (shown, whole)]
    assert sum(counts[0]) < sum(counts[1])
    assert all(less <= more for less, more in zip(*counts, strict=True))
    assert any(less == more > 0 for less, more in zip(*counts, strict=True)), "an image that fits stays as it is"
    assert all(bool(less) == bool(more) for less, more in zip(*counts, strict=True))
    for row in range(len(whole.mask)):
        text = [prompt.embeds[row][prompt.mask[row] & ~prompt.visual[row]] for prompt in (whole, shown)]
        assert torch.equal(*text)
        assert torch.equal(shown.mask[row], torch.arange(shown.mask.shape[1]) < shown.mask[row].sum())


@pytest.mark.parametrize("policy", [Relook(), FullResolution(), RANDOM])
def test_a_row_is_the_same_alone_and_among_others(coarse: VisMemModel, policy: Any) -> None:
    together = generate(coarse, asked(coarse), policy, max_new_tokens=6, temperature=1.0, seed=3)
    for sample, expected in zip(asked(coarse), together, strict=True):
        alone = generate(coarse, [sample], policy, max_new_tokens=6, temperature=1.0, seed=3)[0]
        assert (alone.token_ids, alone.invocations) == (expected.token_ids, expected.invocations)
        assert alone.visual_tokens == expected.visual_tokens


# --- Qwen2.5-VL ---


def resized(image: Image.Image, least: int, most: int) -> Image.Image:
    height, width = smart_resize(image.height, image.width, 28, least, most)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def shrunk(data: bytes, backbone: Backbone, pixels: int) -> bytes:
    """The image as the processor resizes it, made smaller: by hand."""
    size, file = backbone.processor.image_processor.size, io.BytesIO()
    image = resized(Image.open(io.BytesIO(data)).convert("RGB"), size["shortest_edge"], size["longest_edge"])
    resized(image, 0, pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("pixels", [1, 28**2, 4 * 28**2, 7 * 28**2])
def test_a_qwen_prompt_is_that_of_the_images_shrunk_beforehand(
    tiny_base: Path, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, other = load_base(tiny_base), load_base(tiny_base)
    backbone.prompt_pixels = pixels
    video, *_ = families.video_samples()
    first, last, *_ = video.videos[0].frames
    slow = dataclasses.replace(video, videos=(Video((first, first, last, last), 2.0),))  # a pair is one temporal patch
    samples = (*families.samples(), *families.video_samples(), slow)
    small = [
        dataclasses.replace(
            sample,
            images=tuple(shrunk(data, other, pixels) for data in sample.images),
            videos=tuple(Video(tuple(shrunk(f, other, pixels) for f in v.frames), v.fps) for v in sample.videos),
        )
        for sample in samples
    ]
    found = encode(backbone, samples)
    monkeypatch.setattr(other.processor.image_processor, "size", {"shortest_edge": 1, "longest_edge": 10**6})
    assert_same(found, encode(other, small), vision=False)


def test_a_processors_output_gives_the_prompts_of_the_images(tiny_base: Path) -> None:
    backbone = load_base(tiny_base)
    processor, samples = backbone.processor, families.samples()
    backbone.prompt_pixels = LIMITS["qwen2_5_vl"]
    texts, images = [prompt_text(processor, sample) for sample in samples], [families.pictures(s) for s in samples]
    for side in ("left", "right"):
        given = processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt")
        found = backbone.prompt_of(*(given[name] for name in ("input_ids", "attention_mask", *PIXELS)))
        assert_same(found, encode(backbone, samples))


PIXELS = ("pixel_values", "image_grid_thw")

# --- tiles ---


def test_internvl_cuts_as_many_tiles_as_fit_and_answers_as_hugging_face_does_on_them(tmp_path: Path) -> None:
    folder = families.save_base(tmp_path, "internvl")
    model = limited(folder, None)
    processor, tile = model.backbone.processor, 56**2
    seen = []
    for fit in (0.5, 1, 2, 3, 4.9, 5):
        model.backbone.prompt_pixels = int(fit * tile)
        tiles = []
        for sample in (s for s in families.samples() if s.images):
            text = processor.apply_chat_template(prompt_messages(sample), tokenize=False, add_generation_prompt=True)
            # three tiles are two and the thumbnail; two do not come
            most = {0.5: 1, 1: 1, 2: 1, 3: 2, 4.9: 3, 5: 4}[fit]
            inputs = processor(text=[text], images=families.pictures(sample), max_patches=most, return_tensors="pt")
            output = model.backbone.model.generate(**inputs, max_new_tokens=4, do_sample=False)
            expected = output[0, inputs["input_ids"].shape[1] :].tolist()
            rollout = generate(model, [sample], Off(), max_new_tokens=4)[0]
            assert list(rollout.token_ids) == expected[: len(rollout.token_ids)]
            assert rollout.visual_tokens == 4 * len(inputs["pixel_values"])
            tiles.append(rollout.visual_tokens // 4 / len(sample.images))
        assert max(tiles) <= max(1, fit)
        seen.append(sum(tiles))
    assert seen == sorted(seen)
    assert seen[0] < seen[3] < seen[-1]


def test_a_coarse_llava_image_is_its_view_of_all_and_one_line_end(tmp_path: Path) -> None:
    backbone = load_base(families.save_base(tmp_path, "llava_onevision"))
    newline = backbone.model.model.image_newline
    alone = [sample for sample in families.samples() if len(sample.images) == 1]
    whole = encode(backbone, alone)
    backbone.prompt_pixels = 1
    found = encode(backbone, alone)
    for row in range(len(alone)):
        shown, seen = (prompt.embeds[row][prompt.visual[row]] for prompt in (found, whole))
        torch.testing.assert_close(shown, torch.cat([seen[:9], newline[None]]), atol=1e-6, rtol=1e-5)
    backbone.prompt_pixels = 5 * 45**2
    assert_same(encode(backbone, alone), whole)


# --- the whole images ---


def test_full_resolution_is_vanilla_without_a_maximum(fine: VisMemModel, coarse: VisMemModel) -> None:
    whole = generate(coarse, asked(fine), FullResolution(), max_new_tokens=6)
    assert whole == generate(fine, asked(fine), Off(), max_new_tokens=6)
    assert isinstance(ARMS["full_resolution"].policy, FullResolution)
    assert ARMS["full_resolution"].policy.base
    shown = generate(coarse, asked(fine), Off(), max_new_tokens=6)
    assert sum(r.visual_tokens for r in shown) < sum(r.visual_tokens for r in whole)
    assert [r.visual_tokens for r in whole] == encode(fine.backbone, asked(fine)).visual.sum(1).tolist()


def test_relook_shows_the_whole_images_behind_the_coarse_prompt(fine: VisMemModel, coarse: VisMemModel) -> None:
    whole, shown = encode(fine.backbone, asked(fine)), encode(coarse.backbone, asked(fine))
    markers = coarse.backbone.image_markers
    opened = Relook().opened(shown, coarse.backbone, asked(fine))
    rollouts = generate(coarse, asked(fine), Relook(), max_new_tokens=4)
    for row, rollout in enumerate(rollouts):
        length, following = int(shown.mask[row].sum()), int(shown.next_position()[row])
        seen = whole.visual[row].nonzero()[:, 0].tolist()
        block = slice(seen[0] - markers, seen[-1] + 1 + markers) if seen else slice(0, 0)
        end = length + len(whole.embeds[row, block])
        assert torch.equal(opened.embeds[row, :length], shown.embeds[row, :length])
        assert torch.equal(opened.embeds[row, length:end], whole.embeds[row, block])
        if seen:
            moved = whole.positions[:, row, block] - whole.positions[:, row, seen[0] - markers, None]
            assert torch.equal(opened.positions[:, row, length:end] - following, moved)
        assert int(opened.mask[row].sum()) == end
        assert rollout.token_ids[: end - length] == (LATENT,) * (end - length)
        assert rollout.token_ids[end - length] != LATENT
        assert rollout.visual_tokens == int(shown.visual[row].sum() + whole.visual[row].sum())
    assert_same(Relook().opened(whole, fine.backbone, ()), shown_again(whole, whole, markers))


# --- memories ---


def test_replay_scores_what_decoding_scored_and_the_gradient_reaches_both_formers(coarse: VisMemModel) -> None:
    samples = asked(coarse)
    rollouts = generate(coarse, samples, RANDOM, max_new_tokens=8, temperature=1.0, seed=5)
    assert {i.kind for r in rollouts for i in r.invocations} == set(MemoryKind)
    scores = score(coarse, prefill(coarse, samples), rollouts, torch.arange(len(rollouts)))
    assert_replayed(coarse, rollouts, scores)


def test_a_short_memory_tells_apart_images_that_are_the_same_in_the_prompt(tiny_base: Path) -> None:
    """Lines that leave the mean of every three rows of pixels are gone from an image a third as high."""
    model = limited(tiny_base, 28**2)
    grey = torch.full((84, 84, 3), 128, dtype=torch.uint8)
    lined = grey.clone()
    lined[1::3], lined[2::3] = 88, 168
    sample = families.samples()[0]
    files = []
    for pixels in (grey, lined):
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "PNG")
        files.append(file.getvalue())
    alike = [dataclasses.replace(sample, images=(data,)) for data in files]
    prompts = [encode(model.backbone, [one]) for one in alike]
    features = [model.short_stream(prompt.vision).features[0] for prompt in prompts]
    shown = [prompt.embeds[prompt.visual] for prompt in prompts]
    difference, hidden = (float((one - other).detach().abs().mean()) for one, other in (features, shown))
    assert difference > 10 * hidden


# --- files ---


def test_the_maximum_is_saved(tiny_base: Path, tmp_path: Path) -> None:
    limited(tiny_base, 1234).save_pretrained(tmp_path)
    loaded = VisMemModel.from_pretrained(tmp_path, tiny_base)
    assert loaded.memory_config.prompt_pixels == loaded.backbone.prompt_pixels == 1234
    assert load_base(tiny_base).prompt_pixels is None
