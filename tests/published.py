"""Folders with the published configurations of real models, without weights: what `vismem plan` reads of a base.

The values are those of each model's config.json and preprocessor_config.json on the hub. The tokenizer is the tests'
own, and the numbers of its special tokens with it.
"""

from pathlib import Path
from typing import Any

import tiny
import tiny_families
from transformers import (
    InternVLConfig,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from recipes.tiny_vlm.model import build_processor

PARAMETERS = {  # as the hub counts them in the models' safetensors files
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "InternVL3_5-8B-HF": 8_528_318_464,
    "llava-onevision-qwen2-7b-ov-hf": 8_030_348_832,
}
QWEN_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
}
QWEN_3B = {
    **QWEN_7B,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}


def save_published(folder: Path, name: str) -> Path:
    """Write config.json and the processor of the model of that name."""
    build = _qwen if name.startswith("Qwen") else _internvl if name.startswith("InternVL") else _llava
    config, processor = build(folder, name)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _qwen(folder: Path, name: str) -> tuple[Any, Any]:
    text = QWEN_3B if "3B" in name else QWEN_7B
    processor = build_processor([sample.question for sample in tiny.samples()])
    number = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": "3B" in name,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": text["hidden_size"],
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        tie_word_embeddings="3B" in name,
    )
    images = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
    return config, Qwen2_5_VLProcessor(images, processor.tokenizer, chat_template=processor.chat_template)


def _internvl(folder: Path, name: str) -> tuple[Any, Any]:
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = tiny_families.save_tokenizer(folder, {**special, "video_token": "<video>"})
    config = InternVLConfig(
        vision_config={
            "model_type": "internvl_vision",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "attention_bias": True,
            "norm_type": "layer_norm",
            "use_qk_norm": False,
        },
        text_config={
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=256,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, max_patches=12, crop_to_patches=True)
    template = tiny_families.TEMPLATE.replace("PLACE", "<IMG_CONTEXT>")
    return config, InternVLProcessor(images, tokenizer, image_seq_length=256, chat_template=template)


def _llava(folder: Path, name: str) -> tuple[Any, Any]:
    tokenizer = tiny_families.save_tokenizer(folder, {"image_token": "<image>", "video_token": "<video>"})
    grid = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **QWEN_7B, "max_position_embeddings": 32768},
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=grid,
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=False,
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": 384, "width": 384}, image_grid_pinpoints=grid)
    processor = LlavaOnevisionProcessor(
        images,
        tokenizer,
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=tiny_families.TEMPLATE.replace("PLACE", "<image>"),
    )
    return config, processor
