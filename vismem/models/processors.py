"""The families' processors on machines without torchvision, which only their video part needs."""

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, InternVLProcessor, LlavaOnevisionProcessor, Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available


def make_video_optional() -> None:
    """Let the families' processors be built, saved and loaded by `AutoProcessor` without a video processor.

    Does nothing where torchvision is installed. Without it transformers refuses the whole processor, although images
    and text go through Pillow and tokenizers.
    """
    if not is_torchvision_available():
        for processor in (InternVLProcessor, LlavaOnevisionProcessor, Qwen2_5_VLProcessor):
            processor.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])


def load_processor(source: Path | str) -> Any:
    """The processor of a hub id or a folder, with or without torchvision."""
    make_video_optional()
    return AutoProcessor.from_pretrained(str(source))
