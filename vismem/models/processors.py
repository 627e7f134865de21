"""The families' processors, the same with and without torchvision: images through Pillow, no video part."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    InternVLProcessor,
    LlavaOnevisionProcessor,
    Qwen2_5_VLProcessor,
)

from vismem.errors import UserError, first_line
from vismem.files import read_json

# Of an image's settings, those that make its values; its size may be limited anew (`memory.image_pixels`).
VALUES = (
    "do_convert_rgb",
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "patch_size",
    "temporal_patch_size",
    "merge_size",
    "crop_to_patches",
)


def make_video_optional() -> None:
    """Let the families' processors be built, saved and loaded by `AutoProcessor` without a video processor.

    Without torchvision transformers refuses a processor that has one; with it, one that was saved without.
    """
    for processor in (InternVLProcessor, LlavaOnevisionProcessor, Qwen2_5_VLProcessor):
        processor.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])


def load_processor(source: Path | str) -> Any:
    """The processor of a hub id or a folder; its images have the same pixels on every machine."""
    make_video_optional()
    processor = AutoProcessor.from_pretrained(str(source), trust_remote_code=False)
    processor.image_processor = AutoImageProcessor.from_pretrained(str(source), backend="pil", trust_remote_code=False)
    return processor


def differing(processor: Any, folder: Path) -> str | None:
    """What of a processor makes other tokens or pixels of a question than the one that was saved in `folder`.

    The memory's tokens are in both tokenizers. UserError where the saved tokenizer is missing or damaged.
    """
    file = folder / "tokenizer.json"
    try:
        written = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - tokenizers raises no other
        raise UserError(f"{file} is missing or damaged ({first_line(error)}): restore it, or train it again") from None
    if _cutting(processor.tokenizer.backend_tokenizer) != _cutting(written):
        return "tokenizer"
    template, own = folder / "chat_template.jinja", processor.chat_template or ""
    if template.is_file() and isinstance(own, str):  # it may be a dict of several
        lines = template.read_text(encoding="utf-8").splitlines()
        if lines != own.splitlines():
            return "chat template"
    settings = folder / "processor_config.json"
    before = (read_json(settings).get("image_processor") if settings.is_file() else None) or {}
    now = json.loads(processor.image_processor.to_json_string())
    return next((f"{name} of images" for name in VALUES if name in before and before[name] != now.get(name)), None)


def _cutting(tokenizer: Tokenizer) -> tuple[Any, ...]:
    """What cuts a text into tokens, and their ids."""
    parts = json.loads(tokenizer.to_str())
    return tokenizer.get_vocab(), *(parts[name] for name in ("model", "normalizer", "pre_tokenizer", "post_processor"))
