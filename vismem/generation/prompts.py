"""From samples to prompts and reference answers.

`prompt_text` and `target_ids` are the only way from a sample's text to token ids: they keep user text from becoming
special tokens.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from vismem.data.collate import prompt_messages, target_text
from vismem.data.sample import Sample, Video
from vismem.errors import UserError
from vismem.models.backbones import FAMILIES
from vismem.models.backbones.base import Backbone, Clip, Inputs, Prompt
from vismem.runtime.chat import Turn
from vismem.runtime.images import upright
from vismem.runtime.reserved import Reserved


def prompt_text(processor: Any, sample: Sample) -> str:
    """The chat-formatted prompt of a sample; the only special tokens in it are the chat template's.

    A template that would move images to a turn's start, as LLaVA-OneVision's, gets them within the text.
    """
    plain = Reserved(processor.tokenizer.backend_tokenizer).plain
    chat = tuple(Turn(turn.role, tuple(part and plain(part) for part in turn.parts)) for turn in sample.turns())
    messages = prompt_messages(replace(sample, chat=chat))
    between = [message["content"] for message in messages if _image_behind_text(message["content"])]
    if between and _moves_images(processor):
        for content in between:
            words = [processor.image_token if part["type"] == "image" else part["text"] for part in content]
            content[:] = [{"type": "text", "text": "".join(words)}]
    text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _image_behind_text(content: Sequence[dict[str, Any]]) -> bool:
    kinds = [part["type"] for part in content]
    return "text" in kinds and "image" in kinds[kinds.index("text") :] and "video" not in kinds


def _moves_images(processor: Any) -> bool:
    """Whether the chat template puts an image before a text that it stands behind."""
    mark = "\u241ftext\u241f"
    message = {"role": "user", "content": [{"type": "text", "text": mark}, {"type": "image"}]}
    text: str = processor.apply_chat_template([message], tokenize=False)
    return text.find(processor.image_token) < text.find(mark)


def target_ids(tokenizer: Any, sample: Sample) -> list[int]:
    """The reference answer as token ids, none of them special; the end of the turn is not included."""
    text = Reserved(tokenizer.backend_tokenizer).plain(target_text(sample))
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode(backbone: Backbone, samples: Sequence[Sample], whole: bool = False) -> Prompt:
    """The chat-formatted prompts of the samples, with their images and videos; see `inputs_of`."""
    inputs = inputs_of(backbone, samples, whole)
    return backbone.placed(inputs, backbone.features(inputs))


def inputs_of(backbone: Backbone, samples: Sequence[Sample], whole: bool = False) -> Inputs:
    """The same before any weight is used.

    Images of more than the backbone's `prompt_pixels` are coarse in them, unless `whole`.
    UserError for a video where the family takes none, or whose frames are of different sizes.
    """
    for sample in samples:
        if sample.videos and not backbone.takes_video:
            known = ", ".join(name for name, family in FAMILIES.items() if family.takes_video)
            raise UserError(
                f"sample '{sample.id}' has a video, which a base of family '{backbone.family}' does not take here; "
                f"families that do: {known}"
            )
    texts = [prompt_text(backbone.processor, sample) for sample in samples]
    images = [[_decode(data) for data in sample.images] for sample in samples]
    videos = [[_clip(video, sample) for video in sample.videos] for sample in samples]
    return backbone.inputs(texts, images, videos, whole)


def _decode(data: bytes | Image.Image) -> Image.Image:
    if isinstance(data, Image.Image):  # of a question that was prepared
        return data
    return upright(Image.open(io.BytesIO(data)))


def _clip(video: Video, sample: Sample) -> Clip:
    frames = [_decode(data) for data in video.frames]
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1 or not video.fps > 0:
        raise UserError(
            f"sample '{sample.id}' has a video of {len(frames)} frames in {len(sizes)} sizes at {video.fps} frames per "
            "second: at least one frame, one size and a positive rate are needed"
        )
    return Clip(frames, video.fps)


def shown_again(prompt: Prompt, shown: Prompt, markers: int) -> Prompt:
    """The prompts, each followed by the images and videos of `shown`, markers and what stands between them included.

    `shown` are the same prompts, encoded whole perhaps. Embeddings are theirs, positions too, moved behind the prompt
    as one block. `markers` tokens open an image, and as many close it. `visual` marks both looks. Prompts without any
    stay as they are.
    """
    following = prompt.next_position()
    embeds, positions, visual = [], [], []
    for row, length in enumerate(prompt.mask.sum(1).tolist()):
        seen = shown.visual[row].nonzero()[:, 0].tolist()
        block = slice(seen[0] - markers, seen[-1] + 1 + markers) if seen else slice(0, 0)
        again = shown.positions[:, row, block]
        embeds.append(torch.cat([prompt.embeds[row, :length], shown.embeds[row, block]]))
        visual.append(torch.cat([prompt.visual[row, :length], shown.visual[row, block]]))
        moved = again - again[:, :1] + following[row]
        positions.append(torch.cat([prompt.positions[:, row, :length], moved], dim=1).T)
    lengths = torch.tensor([len(row) for row in embeds], device=prompt.mask.device)
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    padded = pad_sequence(positions, batch_first=True).permute(2, 0, 1)
    both = pad_sequence(visual, batch_first=True)
    return Prompt(pad_sequence(embeds, batch_first=True), padded, mask, both, prompt.vision)
