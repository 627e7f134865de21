"""Tiny random models of every supported family, of Hugging Face's own classes; questions about odd-sized pictures."""

import dataclasses
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from recipes.tiny_vlm.model import build_processor
from vismem.data.sample import Sample, Video
from vismem.models.loading import load_base

REAL_VOCABULARY = 152_064  # Qwen2.5-VL-7B's

# `internvl_qk`: as InternVL 3.5 with the large encoder. `llava_llama`: a Llama that reads two layers of the encoder.
VARIANTS = ("qwen2_5_vl", "internvl", "internvl_qk", "llava_onevision", "llava_llama")
TILED = VARIANTS[1:]
SIZES = ((84, 84), (100, 60), (50, 90), (56, 56))
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACE\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, VISION_WIDTH, PATCH = 32, 24, 14


@lru_cache
def samples() -> tuple[Sample, ...]:
    """Questions about one image, about two, and about none; images of several shapes."""
    chosen = tiny.samples()[:5]
    assert {len(s.images) for s in chosen} == {1, 2}
    resized = [dataclasses.replace(s, images=_resized(s.images, i)) for i, s in enumerate(chosen)]
    return (*resized, dataclasses.replace(chosen[0], id="blind", images=()))


@lru_cache
def video_samples() -> tuple[Sample, ...]:
    """Questions about a video, about an image and a video with an odd number of frames, and about two videos."""
    one = next(s for s in samples() if len(s.images) == 1)
    return (
        dataclasses.replace(one, id="video", images=(), videos=(video(4, (84, 84), 2.0),)),
        dataclasses.replace(one, id="mixed", videos=(video(5, (100, 60), 1.5),)),
        dataclasses.replace(one, id="two", images=(), videos=(video(3, (56, 56), 7.0), video(2, (50, 90), 0.4))),
    )


def video(frames: int, size: tuple[int, int], fps: float) -> Video:
    """Frames of noise, no two alike."""
    rng, files = np.random.default_rng(frames), []
    for _ in range(frames):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return Video(tuple(files), fps)


def video_inputs(processor: Any, text: str, pictures: list[Any], videos: tuple[Video, ...]) -> dict[str, torch.Tensor]:
    """What Hugging Face's Qwen takes for a prompt with videos, by hand: its own video processor needs torchvision.

    Pixels as its `patchify` lays them out: time, then 2x2 neighbours, then colour, the two frames, rows and columns.
    """
    images = processor.image_processor
    seen = images(images=pictures, return_tensors="pt") if pictures else {}
    pixels, grids = [], []
    for clip in videos:
        frames = [Image.open(io.BytesIO(data)) for data in clip.frames]
        frames += frames[-1:] * (len(frames) % 2)
        edges = images.size["shortest_edge"], images.size["longest_edge"]
        height, width = smart_resize(frames[0].height, frames[0].width, 28, *edges)
        values = np.stack([np.asarray(f.resize((width, height), Image.Resampling.BICUBIC)) / 255 for f in frames])
        values = (values - images.image_mean) / images.image_std
        grid = (len(frames) // 2, height // PATCH, width // PATCH)
        cut = torch.tensor(values, dtype=torch.float32).permute(0, 3, 1, 2)
        cut = cut.reshape(grid[0], 2, 3, grid[1] // 2, 2, PATCH, grid[2] // 2, 2, PATCH)
        pixels.append(cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid[0] * grid[1] * grid[2], -1))
        grids.append(grid)
    for mark, shapes in (("<|image_pad|>", seen.get("image_grid_thw", ())), ("<|video_pad|>", torch.tensor(grids))):
        before, *after = text.split(mark)
        tokens = [mark * (int(shape.prod()) // 4) for shape in shapes]
        text = before + "".join(token + rest for token, rest in zip(tokens, after, strict=True))
    encoded = processor.tokenizer([text], return_tensors="pt")
    kinds = [
        [{processor.image_token_id: 1, processor.video_token_id: 2}.get(t, 0) for t in encoded["input_ids"][0].tolist()]
    ]
    return {
        **encoded,
        **seen,
        "mm_token_type_ids": torch.tensor(kinds),
        "pixel_values_videos": torch.cat(pixels),
        "video_grid_thw": torch.tensor(grids),
        "second_per_grid_ts": torch.tensor([2 / clip.fps for clip in videos]),
    }


def _resized(images: tuple[bytes, ...], start: int) -> tuple[bytes, ...]:
    files = []
    for index, data in enumerate(images):
        file = io.BytesIO()
        Image.open(io.BytesIO(data)).resize(SIZES[(start + index) % len(SIZES)]).save(file, "PNG")
        files.append(file.getvalue())
    return tuple(files)


def pictures(sample: Sample) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in sample.images]


def save_base(folder: Path, variant: str) -> Path:
    """Write a tiny random model of the variant in Hugging Face format."""
    if variant == "qwen2_5_vl":
        return tiny.save_base(folder)
    build = _internvl if variant.startswith("internvl") else _llava
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = build(folder, variant)
    _randomise(model)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_wide_base(folder: Path, small: Path) -> Path:
    """Write a tiny Qwen2.5-VL with a real one's vocabulary, in bfloat16 and several files; `small` has its small one.

    Its two tables of words are all but all of it.
    """
    base = load_base(save_base(small, "qwen2_5_vl"))
    base.model.resize_token_embeddings(REAL_VOCABULARY, mean_resizing=False)
    base.model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="4MB")
    base.processor.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, special: dict[str, str]) -> Any:
    build_processor([s.question for s in tiny.samples()]).tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=special)
    tokenizer.chat_template = None
    return tokenizer


def _text(tokenizer: Any, kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _vision(kind: str, size: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 2 * VISION_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": PATCH,
    }


def _internvl(folder: Path, variant: str) -> tuple[Any, Any]:
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = save_tokenizer(folder, {**special, "video_token": "<video>"})
    size = 4 * PATCH
    vision, text, more = _vision("internvl_vision", size), _text(tokenizer, "qwen2"), {}
    if variant == "internvl_qk":
        vision |= {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": True, "image_size": size + PATCH}
        text, more = _text(tokenizer, "qwen3"), {"vision_feature_layer": -2}
    image_token = tokenizer.context_image_token_id
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=image_token, image_seq_length=4, **more
    )
    images = GotOcr2ImageProcessorPil(size={"height": size, "width": size}, max_patches=4)
    template = TEMPLATE.replace("PLACE", "<IMG_CONTEXT>")
    processor = InternVLProcessor(images, tokenizer, image_seq_length=4, chat_template=template)
    return InternVLForConditionalGeneration(config), processor


def _llava(folder: Path, variant: str) -> tuple[Any, Any]:
    tokenizer = save_tokenizer(folder, {"image_token": "<image>", "video_token": "<video>"})
    size = 3 * PATCH + 3  # as in SigLIP's 384 pixels, the last ones make no patch
    vision = _vision("siglip_vision_model", size) | {"vision_use_head": False}
    text, layers = _text(tokenizer, "qwen2"), -1
    if variant == "llava_llama":
        text, layers = _text(tokenizer, "llama"), [1, -2]
    grid = [[size, size], [size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=grid,
        vision_feature_layer=layers,
        vision_aspect_ratio="anyres_max_3",
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": size, "width": size}, image_grid_pinpoints=grid)
    processor = LlavaOnevisionProcessor(
        images,
        tokenizer,
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3",
        chat_template=TEMPLATE.replace("PLACE", "<image>"),
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


@torch.no_grad()
def _randomise(model: Any) -> None:
    """No parameter at zero or one, so that a wrong place, a missing term or a wrong order shows."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith(("cls_token", "image_newline", "position_embeddings", "position_embedding.weight")):
            weight.copy_(0.5 * noise)
        elif name.endswith("embed_tokens.weight"):
            weight.copy_(0.1 * noise)
        elif weight.dim() > 1:
            weight.copy_(noise / weight[0].numel() ** 0.5)
        else:
            weight.add_(0.2 * noise)
