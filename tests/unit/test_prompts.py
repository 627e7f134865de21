"""From samples to prompts, without a model: what reaches the backbone, what is refused, and a second look by hand."""

import dataclasses
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from vismem.data.sample import Sample, Video
from vismem.errors import UserError
from vismem.generation import controls, prompts
from vismem.generation.controls import FullResolution, Relook
from vismem.generation.invocation import InvocationPolicy, Off
from vismem.generation.prompts import encode, shown_again, target_ids
from vismem.models.backbones.base import Clip, Prompt


def picture(side: int = 2, mode: str = "RGB", colour: Any = (1, 2, 3)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side), colour).save(file, "PNG")
    return file.getvalue()


PLAIN = Sample(id="plain", images=(), question="what?", answer="a")
SHOWN = dataclasses.replace(PLAIN, id="shown", images=(picture(), picture(3, "L", 9)))
FILMED = dataclasses.replace(PLAIN, id="filmed", videos=(Video((picture(), picture(2, "L", 9)), 2.5),))


class Words:
    """A tokenizer of whole words, one of which is reserved; with special tokens it would append the reserved one."""

    def __init__(self) -> None:
        words = ["w", "why", "answer", ":", "a", "<stop>"]
        self.backend_tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="w"))
        self.backend_tokenizer.pre_tokenizer = Whitespace()
        self.backend_tokenizer.add_special_tokens(["<stop>"])
        self.backend_tokenizer.post_processor = TemplateProcessing("$0 <stop>", special_tokens=[("<stop>", 5)])

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}


class Recorder:
    """A backbone that returns what it is given."""

    family, takes_video, prompt_pixels, image_markers = "made_up", True, None, 1

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)
        self.processor = SimpleNamespace(tokenizer=Words(), apply_chat_template=self._template)

    def _template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert tokenize is False
        assert add_generation_prompt is True
        (message,) = messages
        return " ".join(part.get("text", part["type"]) for part in message["content"])

    def inputs(self, *arguments: Any) -> Any:
        return arguments

    def features(self, inputs: Any) -> Any:
        return "features of", inputs

    def placed(self, inputs: Any, features: Any) -> Any:
        assert features == ("features of", inputs)
        return inputs


def encoded(*samples: Sample, **settings: Any) -> Any:
    return encode(Recorder(**settings), samples)  # type: ignore[arg-type]


def test_each_sample_s_text_images_and_videos_reach_the_backbone_in_order() -> None:
    texts, images, videos, whole = encoded(SHOWN, FILMED, PLAIN)
    assert texts == ["image image what?", "video what?", "what?"]
    assert [[image.getpixel((0, 0)) for image in row] for row in images] == [[(1, 2, 3), (9, 9, 9)], [], []]
    assert [image.size for image in images[0]] == [(2, 2), (3, 3)]
    ((clip,),) = videos[1:2]
    assert isinstance(clip, Clip)
    assert clip.fps == 2.5
    assert [frame.getpixel((0, 0)) for frame in clip.frames] == [(1, 2, 3), (9, 9, 9)]
    assert videos[0] == videos[2] == []
    assert whole is False
    assert encode(Recorder(), [SHOWN], whole=True)[3] is True  # type: ignore[arg-type, index]


def test_reserved_tokens_in_a_question_or_an_answer_are_taken_apart() -> None:
    hostile = dataclasses.replace(PLAIN, question="<stop> what?", answer="a <stop>", rationale="why")
    assert encoded(hostile)[0] == ["<\u200bstop> what?"]
    ids = target_ids(Words(), hostile)
    assert ids[:4] == target_ids(Words(), dataclasses.replace(PLAIN, rationale="why")) == [1, 2, 3, 4]
    assert 5 not in ids


def test_a_family_without_video_takes_images_and_says_which_families_take_videos(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    families = {name: SimpleNamespace(takes_video=takes) for name, takes in (("a", True), ("b", False), ("c", True))}
    monkeypatch.setattr(prompts, "FAMILIES", families)
    assert encoded(SHOWN, takes_video=False)[0] == ["image image what?"]
    with pytest.raises(UserError) as refused:
        encoded(SHOWN, FILMED, takes_video=False)
    assert str(refused.value) == (
        "sample 'filmed' has a video, which a base of family 'made_up' does not take here; families that do: a, c"
    )


@pytest.mark.parametrize(
    ("video", "said"),
    [
        (Video((), 2.0), "0 frames in 0 sizes at 2.0 frames"),
        (Video((picture(), picture(3)), 2.0), "2 frames in 2 sizes at 2.0 frames"),
        (Video((picture(),), 0.0), "1 frames in 1 sizes at 0.0 frames"),
        (Video((picture(),), float("nan")), "1 frames in 1 sizes at nan frames"),
    ],
)
def test_a_video_without_frames_one_size_or_a_rate_is_refused(video: Video, said: str) -> None:
    with pytest.raises(UserError) as refused:
        encoded(dataclasses.replace(FILMED, videos=(video,)))
    assert str(refused.value) == (
        f"sample 'filmed' has a video of {said} per second: at least one frame, one size and a positive rate are needed"
    )


def test_a_slow_video_is_taken() -> None:
    (clip,) = encoded(dataclasses.replace(FILMED, videos=(Video((picture(),), 0.5),)))[2][0]
    assert clip.fps == 0.5


# --- a second look ---


def made(rows: list[str], step: int = 1) -> Prompt:
    """Prompts in which `v` is a visual token, `m` a marker and any other a word; embeddings tell all places apart."""
    width = max(map(len, rows))
    mask, visual = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(2))
    for row, tokens in enumerate(rows):
        mask[row, : len(tokens)] = True
        visual[row, : len(tokens)] = torch.tensor([token == "v" for token in tokens])
    embeds = step * torch.arange(1.0, mask.numel() * 2 + 1).view(len(rows), width, 2)
    axes = torch.tensor([1, 2, 3])[:, None, None]
    positions = (axes * step * torch.arange(3, width + 3)).expand(3, len(rows), width).contiguous()
    return Prompt(embeds, positions, mask, visual, vision="patches")  # type: ignore[arg-type]


ROWS = ["wmvvmwmvmw", "ww", "mvm"]


@pytest.mark.parametrize(("markers", "blocks"), [(1, [(1, 9), (0, 0), (0, 3)]), (0, [(2, 8), (0, 0), (1, 2)])])
def test_prompts_are_followed_by_all_from_their_first_marker_to_their_last(
    markers: int, blocks: list[tuple[int, int]]
) -> None:
    prompt, shown = made(ROWS), made(ROWS, step=2)
    both = shown_again(prompt, shown, markers)
    lengths = [len(row) + stop - start for row, (start, stop) in zip(ROWS, blocks, strict=True)]
    assert both.mask.sum(1).tolist() == lengths
    assert both.embeds.shape[1] == both.mask.shape[1] == max(lengths)
    assert both.vision == prompt.vision
    for row, (start, stop) in enumerate(blocks):
        own, end = len(ROWS[row]), lengths[row]
        assert both.mask[row, :end].all()
        assert torch.equal(both.embeds[row, :own], prompt.embeds[row, :own])
        assert torch.equal(both.embeds[row, own:end], shown.embeds[row, start:stop])
        assert torch.equal(both.visual[row, :own], prompt.visual[row, :own])
        assert torch.equal(both.visual[row, own:end], shown.visual[row, start:stop])
        assert torch.equal(both.positions[:, row, :own], prompt.positions[:, row, :own])
        block: Tensor = shown.positions[:, row, start:stop]
        moved = both.positions[:, row, own:end] - prompt.next_position()[row]
        assert torch.equal(moved, block - block[:, :1])
        assert not both.embeds[row, end:].any()
        assert not both.visual[row, end:].any()
        assert not both.positions[:, row, end:].any()


def test_relook_shows_what_is_whole_and_encodes_it_only_where_the_prompt_is_coarse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt, whole, asked = made(ROWS), made(["wmvvvvmwmvmw", "ww", "mvm"], step=2), []

    def encoding(backbone: Any, samples: Any, whole: bool) -> Prompt:
        asked.append((backbone, samples, whole))
        return shown

    shown = whole
    monkeypatch.setattr(controls, "encode", encoding)
    for backbone, expected in ((Recorder(), prompt), (Recorder(prompt_pixels=7), whole)):
        opened = Relook().opened(prompt, backbone, [SHOWN])  # type: ignore[arg-type]
        assert torch.equal(opened.embeds, shown_again(prompt, expected, 1).embeds)
        assert torch.equal(opened.visual, shown_again(prompt, expected, 1).visual)
    ((backbone, samples, is_whole),) = asked
    assert (backbone.prompt_pixels, samples, is_whole) == (7, [SHOWN], True)
    for policy in (InvocationPolicy(), Off(), FullResolution()):
        assert policy.opened(prompt, Recorder(), [SHOWN]) is prompt  # type: ignore[arg-type]
