"""VisMem on Qwen2.5-VL with random weights: at the 7B model's size, by its real configuration, and at toy size."""

from typing import Any

import torch
from common import TINY_VLM
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vismem.config import Config
from vismem.models.backbones import backbone_of
from vismem.models.processors import load_processor
from vismem.models.vismem import VisMemModel

Sizes = dict[str, dict[str, Any]]
SEVEN_B: Sizes = {  # config.json of Qwen/Qwen2.5-VL-7B-Instruct, where it differs from its class's defaults
    "text_config": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"hidden_size": 1280},
}  # fmt: skip
TINY: Sizes = {
    "text_config": {
        "vocab_size": 3000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    },
}  # fmt: skip


def build(sizes: Sizes, side: int, config: Config) -> VisMemModel:
    """VisMem on a Qwen2.5-VL of these sizes with random weights; answers never end by themselves.

    The base's small files are written to the folder `config.base.model`.
    """
    processor = load_processor(TINY_VLM)
    processor.image_processor = Qwen2VLImageProcessorPil(min_pixels=side**2, max_pixels=side**2)
    ids = processor.tokenizer.get_vocab()
    settings = Qwen2_5_VLConfig(
        **sizes, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    settings.save_pretrained(config.base.model)
    processor.save_pretrained(config.base.model)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        base = AutoModelForImageTextToText.from_config(settings, dtype=getattr(torch, config.base.dtype))
    base.generation_config.eos_token_id = ids["<|im_end|>"]
    model = VisMemModel(backbone_of(base, processor), config.memory, config.invocation)
    model.stop_ids, base.generation_config.eos_token_id = (), None
    return model
