"""The embedded base: a tiny Qwen2.5-VL of Hugging Face's own classes, with its own tokenizer, untrained.

Width and depth come from `BaseConfig`; everything that loads Qwen2.5-VL loads it.
"""

import json
import math
from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vismem.config import BaseConfig
from vismem.models.processors import make_video_optional

CELL = 28  # pixels a side of what becomes one visual token: 14-pixel patches, merged 2x2
LEAST_PIXELS, MOST_PIXELS = (3 * CELL) ** 2, (6 * CELL) ** 2  # smaller and larger images are resized
EMBEDDING_STD = 0.3
VOCABULARY = 1400
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
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


def build_processor(texts: Iterable[str]) -> Qwen2_5_VLProcessor:
    """A Qwen2.5-VL processor whose byte-level BPE was trained on `texts`.

    Qwen's own splitting rule keeps punctuation apart from words, so every delimiter is a token of its own.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, *(f"{word} a {word}" for word in MORE_WORDS.split())], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe.get_vocab(),
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
    )
    make_video_optional()
    images = Qwen2VLImageProcessorPil(min_pixels=LEAST_PIXELS, max_pixels=MOST_PIXELS)
    return Qwen2_5_VLProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


def build_model(config: BaseConfig, processor: Qwen2_5_VLProcessor, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained model of the configured size that fits the processor's vocabulary."""
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    axis = config.hidden_size // config.heads // 2  # rotary frequencies a head, shared out to three axes
    across = axis * 3 // 8
    settings = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": config.hidden_size,
            "intermediate_size": 3 * config.hidden_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [axis - 2 * across, across, across],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": config.vision_layers,
            "hidden_size": config.vision_width,
            "intermediate_size": 2 * config.vision_width,
            "num_heads": 4,
            "out_hidden_size": config.hidden_size,
            "window_size": 2 * CELL,
            "fullatt_block_indexes": sorted({*range(1, config.vision_layers, 2), config.vision_layers - 1}),
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(settings)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )
    initialise(model, seed)
    share_words(model, processor)
    return model


@torch.no_grad()
def initialise(model: Qwen2_5_VLForConditionalGeneration, seed: int) -> None:
    """Normal weights of std 1/sqrt(fan-in), output projections scaled by 1/sqrt(2 * layers), biases zero.

    Hugging Face's std of 0.02 learns far more slowly at this size.
    """
    generator = torch.Generator().manual_seed(seed)
    for tower in (model.model.visual, model.model.language_model, model.lm_head):
        scale_to_fan_in(tower, len(getattr(tower, "blocks", getattr(tower, "layers", ()))), generator)


@torch.no_grad()
def scale_to_fan_in(tower: nn.Module, depth: int, generator: torch.Generator) -> None:
    """Draw a tower of `depth` layers anew, as `initialise` says."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            std = 1 / math.sqrt(module.weight[0].numel())
            if name.endswith(("o_proj", "down_proj", "attn.proj", "out_proj", "fc2")):
                std /= math.sqrt(2 * depth)
            module.weight.normal_(0, std, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, EMBEDDING_STD, generator=generator)


@torch.no_grad()
def share_words(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> None:
    """A word starts the same with and without a space before it, and the head starts as half the embeddings.

    With this, what the vision tower learns to say of a cell (see `pretraining`) can be copied out from the first step.
    """
    words = processor.tokenizer.get_vocab()
    embeddings = model.get_input_embeddings().weight
    for word, spaced in words.items():
        if word.startswith("Ġ") and word[1:] in words:
            embeddings[words[word[1:]]] = embeddings[spaced]
    model.lm_head.weight.copy_(0.5 * embeddings)
