"""Videos of Qwen2.5-VL: positions and logits as in Hugging Face, memories that read them, and who refuses them.

Features, greedy tokens, batches and gradients of prompts with videos are compared in test_backbones.
"""

import dataclasses
from pathlib import Path

import pytest
import tiny
import tiny_families as families
import torch

from vismem.data.collate import prompt_messages
from vismem.data.sample import Sample, Video, read_samples, write_shards
from vismem.errors import UserError
from vismem.export.parity import prepared
from vismem.generation.prompts import encode
from vismem.models.loading import load_base
from vismem.models.memory import causal_mask, summary
from vismem.models.vismem import VisMemModel
from vismem.runtime.limits import RequestError

CLIP, MIXED, TWO = families.video_samples()
FRAMES = CLIP.videos[0].frames


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    return tiny.vismem(tiny_base)


def with_video(*frames: bytes, fps: float = 2.0) -> Sample:
    return dataclasses.replace(CLIP, videos=(Video(frames, fps),))


@torch.no_grad()
def test_logits_of_a_batch_with_and_without_videos_equal_hugging_face(model: VisMemModel) -> None:
    backbone, marked = model.backbone, dataclasses.replace(MIXED, question="what is <image> in it?")
    rows = [*families.video_samples(), *families.samples(), marked]
    prompt = encode(backbone, rows)
    hidden = backbone.language(prompt.embeds, prompt.positions, causal_mask(prompt.mask))
    for row, sample in enumerate(rows):
        template = backbone.processor.apply_chat_template
        text = template(prompt_messages(sample), tokenize=False, add_generation_prompt=True)
        pictures = families.pictures(sample)
        if sample.videos:
            inputs = families.video_inputs(backbone.processor, text, pictures, sample.videos)
        else:
            inputs = backbone.processor(text=[text], images=pictures or None, return_tensors="pt")
        expected = backbone.model(**inputs).logits[0]
        torch.testing.assert_close(backbone.head(hidden[row][prompt.mask[row]]), expected, atol=1e-5, rtol=1e-4)


def test_a_videos_tokens_stand_at_their_time_row_and_column(model: VisMemModel) -> None:
    """Time counts `tokens_per_second`, rows and columns count merged patches, all from the place where it starts."""
    settings = model.backbone.model.config.vision_config
    for fps in (1.0, 2.0, 3.0):
        prompt = encode(model.backbone, [with_video(*FRAMES, fps=fps)])
        start = int(prompt.visual[0].int().argmax())
        found = prompt.positions[:, 0, prompt.visual[0]] - start
        later = int(settings.tokens_per_second * 2 / fps)  # 4 frames of 84x84 pixels: 2 times 3 rows 3 columns
        expected = [(time, row, column) for time in (0, later) for row in range(3) for column in range(3)]
        assert found.T.tolist() == [list(place) for place in expected]


def test_an_odd_number_of_frames_is_filled_up_with_the_last_one(model: VisMemModel) -> None:
    odd, even, other = (
        encode(model.backbone, [with_video(*frames)]) for frames in (FRAMES[:3], (*FRAMES[:3], FRAMES[2]), FRAMES)
    )
    assert torch.equal(odd.embeds, even.embeds)
    assert not torch.equal(odd.embeds, other.embeds)


def test_a_video_of_one_frame_is_read_as_the_image_is(model: VisMemModel) -> None:
    image = encode(model.backbone, [dataclasses.replace(CLIP, images=FRAMES[:1], videos=())])
    video = encode(model.backbone, [with_video(FRAMES[0])])
    assert torch.equal(image.embeds[image.visual], video.embeds[video.visual])
    assert torch.equal(image.positions, video.positions)


def test_a_short_memory_reads_every_frame_of_a_video(model: VisMemModel) -> None:
    states = torch.randn(1, 3, model.backbone.width, generator=torch.Generator().manual_seed(0))
    segment = summary(states, torch.ones(1, 3))

    def memory(*frames: bytes) -> torch.Tensor:
        backbone = model.backbone
        with model.short.lora.active():
            stream = backbone.patch_stream(encode(backbone, [with_video(*frames)]).vision)
        queries = torch.zeros(1, 4, backbone.width)
        return model.short(backbone, queries, segment, stream, torch.tensor([0]))

    formed = memory(*FRAMES)
    assert formed.isfinite().all()
    for frame in range(4):
        changed = [*FRAMES]
        changed[frame] = families.video(9, (84, 84), 1.0).frames[0]
        assert (memory(*changed) - formed).abs().max() > 1e-4, f"frame {frame}"
    model.zero_grad()
    formed.square().sum().backward()
    gradient = model.short.memory_init.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("variant", ["internvl", "llava_onevision"])
def test_a_family_without_video_refuses_it_and_names_those_with(variant: str, tmp_path: Path) -> None:
    backbone = load_base(families.save_base(tmp_path, variant))
    with pytest.raises(UserError, match=rf"sample 'mixed' has a video.*'{variant}'.*families that do: qwen2_5_vl"):
        encode(backbone, [families.samples()[0], MIXED])


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (with_video(), "a video of 0 frames"),
        (with_video(*FRAMES, fps=0.0), "at 0.0 frames per second"),
        (with_video(*FRAMES, *MIXED.videos[0].frames), "in 2 sizes"),
    ],
)
def test_a_prompt_that_cannot_be_made_is_refused_with_what_is_wrong(
    model: VisMemModel, sample: Sample, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        encode(model.backbone, [sample])


def test_a_chat_template_that_does_not_place_the_video_is_refused(
    model: VisMemModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.backbone.processor, "chat_template", "{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(UserError, match=r"0 x <\|video_pad\|> for 1 of them"):
        encode(model.backbone, [CLIP])


def test_parity_says_that_a_bundle_takes_no_video() -> None:
    with pytest.raises(RequestError, match="images only"):
        prepared(None, CLIP, max_new_tokens=1)  # type: ignore[arg-type]


def test_samples_with_videos_come_back_from_parquet(tmp_path: Path) -> None:
    rows = [*families.video_samples(), families.samples()[0]]
    write_shards(rows, tmp_path)
    assert read_samples(tmp_path) == rows
