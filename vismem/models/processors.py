"""Qwen2.5-VL's processor on machines without torchvision, which only its video part needs."""

from transformers import Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available


def make_video_optional() -> None:
    """Let `Qwen2_5_VLProcessor` be built, saved and loaded by `AutoProcessor` without a video processor.

    Does nothing where torchvision is installed. Without it transformers refuses the whole processor, although images
    and text go through Pillow and tokenizers.
    """
    if not is_torchvision_available():
        Qwen2_5_VLProcessor.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])
