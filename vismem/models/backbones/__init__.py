"""One small file a family; `backbone_of` picks it by the model's own type."""

from typing import Any

from vismem.errors import UserError
from vismem.models.backbones.base import Backbone
from vismem.models.backbones.qwen2_5_vl import Qwen25VLBackbone

FAMILIES: dict[str, type[Backbone]] = {"qwen2_5_vl": Qwen25VLBackbone}


def backbone_of(model: Any, processor: Any) -> Backbone:
    """The backbone for a loaded Hugging Face model. UserError for a family that is not supported."""
    family = model.config.model_type
    if family not in FAMILIES:
        raise UserError(f"model family '{family}' is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[family](model, processor)  # type: ignore[call-arg]
