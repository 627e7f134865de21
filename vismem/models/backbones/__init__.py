"""One small file per family; `backbone_of` picks it by the model's own type."""

from typing import Any

from vismem.models.backbones.base import Backbone
from vismem.models.backbones.internvl import InternVLBackbone
from vismem.models.backbones.llava_onevision import LlavaOnevisionBackbone
from vismem.models.backbones.qwen2_5_vl import Qwen25VLBackbone
from vismem.models.families import check_family

FAMILIES: dict[str, type[Backbone]] = {
    "internvl": InternVLBackbone,
    "llava_onevision": LlavaOnevisionBackbone,
    "qwen2_5_vl": Qwen25VLBackbone,
}


def backbone_of(model: Any, processor: Any) -> Backbone:
    """The backbone for a loaded Hugging Face model. UserError for a family that is not supported."""
    check_family(model.config.model_type)
    return FAMILIES[model.config.model_type](model, processor)
