"""Processors are the same with torchvision and without."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoImageProcessor, InternVLProcessor, LlavaOnevisionProcessor, Qwen2_5_VLProcessor

from vismem.models import processors

ASSET = Path(__file__).parents[2] / "assets" / "tiny-vlm"


def test_a_processor_has_no_video_part_where_torchvision_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    families = (InternVLProcessor, LlavaOnevisionProcessor, Qwen2_5_VLProcessor)
    for family in families:  # as transformers has them
        monkeypatch.delattr(family, "get_attributes")
        assert "video_processor" in family.get_attributes()
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: True)
    importlib.reload(processors).make_video_optional()
    assert [family.get_attributes() for family in families] == [["image_processor", "tokenizer"]] * 3


def test_images_go_through_pillow_where_torchvision_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    load = AutoImageProcessor.from_pretrained

    def recorded(*args: Any, **options: Any) -> Any:
        asked.append(options.get("backend"))
        return load(*args, **options)

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", recorded)
    loaded = processors.load_processor(ASSET)
    assert asked[-1] == "pil", "by default transformers takes torchvision where it is installed"
    assert type(loaded.image_processor).__name__.endswith("Pil")
