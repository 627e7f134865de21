"""The families of bases that `vismem.models.backbones` has a file for, by name; nothing of transformers is imported."""

from vismem.errors import UserError

NAMES = ("internvl", "llava_onevision", "qwen2_5_vl")  # as `model_type` of config.json has them
HINTS = {"internvl_chat": "take the repository of the same name that ends in -HF or -hf"}


def check_family(family: str) -> None:
    """UserError for a model type that is not supported."""
    if family not in NAMES:
        hint = f"; {HINTS[family]}" if family in HINTS else ""
        raise UserError(f"model family '{family}' is not supported; supported: {', '.join(NAMES)}{hint}")
