"""Chat texts and images to model inputs: `load_processor` for every family, `VisionProcessor` for Qwen2.5-VL.

`VisionProcessor` is image processor, tokenizer and chat template, without the video processor. Hugging Face's own
`Qwen2_5_VLProcessor` does the same and needs torchvision for videos; the files are shared, so
`AutoProcessor.from_pretrained` opens them where torchvision is installed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, BatchFeature

IMAGE_TOKEN = "<|image_pad|>"


class VisionProcessor:
    """Chat texts and PIL images to model inputs."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> Any:
        """The tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(messages, **kwargs)

    def __call__(self, text: Sequence[str], images: Sequence[Any] | None = None, **kwargs: Any) -> BatchFeature:
        """Widen every `<|image_pad|>` to its image's tokens and tokenize; images are listed in the order of the texts.

        Returns input_ids, attention_mask, mm_token_type_ids (1 on image tokens), pixel_values and image_grid_thw.
        """
        pixels: dict[str, Any] = {}
        if images:
            pixels = dict(self.image_processor(images=list(images), return_tensors="pt"))
            widths = iter((pixels["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
            text = [self._widen(part, widths) for part in text]
        tokens = self.tokenizer(list(text), **kwargs)
        tokens["mm_token_type_ids"] = (tokens["input_ids"] == self.image_token_id).int()
        return BatchFeature({**tokens, **pixels})

    @staticmethod
    def _widen(text: str, widths: Any) -> str:
        first, *rest = text.split(IMAGE_TOKEN)
        return first + "".join(IMAGE_TOKEN * next(widths) + part for part in rest)

    def decode(self, ids: Any, **kwargs: Any) -> str:
        """The tokenizer's decode."""
        return str(self.tokenizer.decode(ids, **kwargs))

    def batch_decode(self, ids: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's batch_decode."""
        return list(self.tokenizer.batch_decode(ids, **kwargs))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the image processor's and the tokenizer's files, in Hugging Face format."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, name: Path | str) -> "VisionProcessor":
        """Load from a hub id or a folder."""
        return cls(AutoImageProcessor.from_pretrained(str(name)), AutoTokenizer.from_pretrained(str(name)))


def load_processor(name: Path | str, family: str) -> Any:
    """The processor of a model of that family, from a hub id or a folder."""
    if family == "qwen2_5_vl":
        return VisionProcessor.from_pretrained(name)
    return AutoProcessor.from_pretrained(str(name))
