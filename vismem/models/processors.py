"""The families' processors, the same with and without torchvision: images through Pillow, no video part."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    InternVLProcessor,
    LlavaOnevisionProcessor,
    Qwen2_5_VLProcessor,
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
