"""The tiny VLM, untrained: a Qwen2.5-VL of Hugging Face's own classes with its own tokenizer.

Everything that loads Qwen2.5-VL loads it.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vismem.models.processors import make_video_optional

CELL = 28  # pixels per side of what becomes one visual token: 14-pixel patches, merged 2x2
MIN_PIXELS, MAX_PIXELS = (3 * CELL) ** 2, (6 * CELL) ** 2  # smaller and larger images are resized
EMBEDDING_STD = 0.3
VOCABULARY = 1400
SPECIAL_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL_TOKENS = [f"<|{name}|>" for name in SPECIAL_NAMES]
# Words of other sources of questions (easy-VQA, NLVR), so that they are whole tokens as well.
MORE_WORDS = (
    "rectangle teal brown gray grey white cyan does do contain present shape color image not a an the no yes is are "
    "what which how many there any box tower exactly least most all only one two three four five touching edge wall "
    "base closely with and or item items block blocks object objects side true false system user assistant you helpful"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Width and depth."""

    width: int = 96  # of the language model
    layers: int = 3
    heads: int = 4
    vision_width: int = 96
    vision_layers: int = 3
    window: int = 2  # visual tokens along the side of what all but every other layer attends within


def build_processor(
    texts: Iterable[str], min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> Qwen2_5_VLProcessor:
    """A Qwen2.5-VL processor whose byte-level BPE was trained on `texts`.

    Qwen's own splitting rule keeps punctuation apart from words, so every delimiter is a token of its own.
    """
    qwen, bpe = Qwen2Tokenizer().backend_tokenizer, Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    size, alphabet = VOCABULARY - len(SPECIAL_TOKENS), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*texts, *(f"{word} a {word}" for word in MORE_WORDS.split())], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe.get_vocab(),
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        padding_side="left",
    )
    make_video_optional()
    images = Qwen2VLImageProcessorPil(min_pixels=min_pixels, max_pixels=max_pixels)
    return Qwen2_5_VLProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


def build_model(size: Size, processor: Qwen2_5_VLProcessor, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained model of this size that fits the processor's vocabulary."""
    ids = dict(zip(SPECIAL_NAMES, processor.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    padding = {"bos_token_id": ids["endoftext"], "pad_token_id": ids["endoftext"]}
    axis = size.width // size.heads // 2  # rotary frequencies per head, divided among three axes
    spatial = axis * 3 // 8
    sections = [axis - 2 * spatial, spatial, spatial]
    settings = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": size.width,
            "intermediate_size": 3 * size.width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
            "eos_token_id": ids["im_end"],
            **padding,
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_width,
            "intermediate_size": 2 * size.vision_width,
            "num_heads": 4,
            "out_hidden_size": size.width,
            "window_size": size.window * CELL,
            "fullatt_block_indexes": sorted({*range(1, size.vision_layers, 2), size.vision_layers - 1}),
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(settings)
    ends = [ids["im_end"], ids["endoftext"]]
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, **padding)
    initialise(model, seed)
    share_words(model, processor)
    return model


@torch.no_grad()
def initialise(model: Qwen2_5_VLForConditionalGeneration, seed: int) -> None:
    """Draw weights of std 1/sqrt(fan-in), output projections scaled by 1/sqrt(2 * layers); biases are zero.

    Hugging Face's std of 0.02 learns far more slowly at this size.
    """
    generator = torch.Generator().manual_seed(seed)
    for tower in (model.model.visual, model.model.language_model, model.lm_head):
        depth = len(getattr(tower, "blocks", getattr(tower, "layers", ())))
        for name, module in tower.named_modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                std = 1 / math.sqrt(module.weight[0].numel())
                if name.endswith(("o_proj", "down_proj", "attn.proj")):
                    std /= math.sqrt(2 * depth)
                module.weight.normal_(0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, EMBEDDING_STD, generator=generator)


@torch.no_grad()
def share_words(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> None:
    """Make a word start the same with and without a space before it, and the head as half the embeddings.

    With this, the words that the vision tower learns for a cell (see `objectives`) can be copied out from the first
    step.
    """
    words = processor.tokenizer.get_vocab()
    embeddings = model.get_input_embeddings().weight
    for word, spaced in words.items():
        if word.startswith("Ġ") and word[1:] in words:
            embeddings[words[word[1:]]] = embeddings[spaced]
    model.lm_head.weight.copy_(0.5 * embeddings)
