"""The step `base`: the vision-language model that goes in, loaded from elsewhere or built and trained here."""

import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from vismem.config import Config
from vismem.data.collate import answer_part, prompt_messages, target_text
from vismem.data.sample import Sample, read_samples
from vismem.errors import UserError
from vismem.models.backbones import FAMILIES
from vismem.models.backbones.base import Backbone
from vismem.models.backbones.llava_onevision import LlavaOnevisionBackbone
from vismem.models.backbones.qwen2_5_vl import Qwen25VLBackbone
from vismem.models.processors import load_processor
from vismem.training import alignment
from vismem.training.embedded import build_model, build_processor
from vismem.training.pretraining import train_language, train_vision
from vismem.training.sequences import Encoder
from vismem.training.small import build_small

BUILT = ("embedded", "small")  # what `base.model` may say instead of a hub id or a path
CHECKED = 208  # validation questions answered for metrics.json
LONGEST = 48  # tokens of an answer there


def base(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Write the base VLM to `out` in Hugging Face format, with its processor; embedded: with metrics and loss curve.

    UserError for a model that cannot be found, has no vision, or is of a family that VisMem has no file for.
    """
    name = config.base.model
    if name not in BUILT:
        return _resolve(config, out)
    data = inputs["validate"] / "data"
    if not (data / "pretrain").is_dir():
        raise UserError(f"base.model '{name}' trains on {data / 'pretrain'}, which is not there: run `vismem prepare`")
    pretrain, validation = read_samples(data / "pretrain"), read_samples(data / "validation")
    if watched := [sample.id for sample in pretrain if sample.videos]:
        raise UserError(
            f"base.model '{name}' learns from images only, but {len(watched)} of the pretrain questions have a video "
            f"(first '{watched[0]}'): keep videos to the other splits, or name a trained Qwen2.5-VL"
        )
    torch.manual_seed(config.seed)
    backbone, curve = (_embedded if name == "embedded" else _small)(config, pretrain, out)
    model, processor = backbone.model, backbone.processor
    model.eval().save_pretrained(out)
    processor.save_pretrained(out)
    (out / "loss.json").write_text(json.dumps(curve))
    metrics = check(model, processor, [sample for sample in validation if not sample.videos][:CHECKED])
    metrics["parameters"] = sum(weight.numel() for weight in model.parameters())
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    for leftover in out.glob("*.checkpoint"):
        leftover.unlink()
    return (
        f"base: {backbone.family} of {metrics['parameters'] / 1e6:.1f}M parameters, trained on {len(pretrain)} "
        f"questions, {metrics['accuracy']:.1f} % of {metrics['n']} validation questions right"
    )


def _embedded(config: Config, pretrain: Sequence[Sample], out: Path) -> tuple[Backbone, list[dict[str, Any]]]:
    """The embedded base, trained, and its loss curve."""
    processor = build_processor(text for s in pretrain for text in (s.question, target_text(s)))
    backbone = Qwen25VLBackbone(build_model(config.base, processor, config.seed), processor)
    encoder = Encoder(processor)
    records = [encoder.encode(sample) for sample in pretrain]
    curve = train_vision(backbone, encoder, pretrain, config.base, config.seed, out)
    return backbone, curve + train_language(backbone, encoder, records, config.base, config.seed, out)


def _small(config: Config, pretrain: Sequence[Sample], out: Path) -> tuple[Backbone, list[dict[str, Any]]]:
    """The small base, trained (on a GPU if there is one), and its loss curve."""
    model, processor = build_small(config.base, config.seed)
    backbone = LlavaOnevisionBackbone(model.to("cuda" if torch.cuda.is_available() else "cpu"), processor)
    curve = alignment.train_tower(backbone, pretrain, config.base, config.seed, out)
    return backbone, curve + alignment.train_language(backbone, pretrain, config.base, config.seed, out)


@torch.no_grad()
def check(model: Any, processor: Any, samples: Sequence[Sample], batch_size: int = 52) -> dict[str, Any]:
    """Answer `samples` greedily with Hugging Face's `generate`: accuracy in percent, overall and by task."""
    right: dict[str, list[bool]] = defaultdict(list)
    for at in range(0, len(samples), batch_size):
        batch = samples[at : at + batch_size]
        for sample, text in zip(batch, answer(model, processor, batch), strict=True):
            right[sample.task].append(answer_part(text) == sample.answer)
    every = [hit for hits in right.values() for hit in hits]
    by_task = {task: round(100 * sum(hits) / len(hits), 2) for task, hits in sorted(right.items())}
    return {"accuracy": round(100 * sum(every) / max(1, len(every)), 2), "n": len(every), "tasks": by_task}


def answer(model: Any, processor: Any, samples: Sequence[Sample], max_new_tokens: int = LONGEST) -> list[str]:
    """Greedy answers by Hugging Face's `generate`, special tokens left out."""
    texts = [
        processor.apply_chat_template(prompt_messages(sample), tokenize=False, add_generation_prompt=True)
        for sample in samples
    ]
    images = [[Image.open(io.BytesIO(image)).convert("RGB") for image in sample.images] for sample in samples]
    encoded = processor(
        text=texts, images=images if any(images) else None, padding=True, padding_side="left", return_tensors="pt"
    )
    made = model.generate(**encoded.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    decoded: list[str] = processor.batch_decode(made[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return decoded


def _resolve(config: Config, out: Path) -> str:
    """Load a model by hub id or path and keep a copy, so that later steps do not depend on where it came from."""
    name = config.base.model
    try:
        settings = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"base.model '{name}' is no model that can be loaded (hub id or folder): {error}") from None
    if getattr(settings, "vision_config", None) is None:
        raise UserError(f"base.model '{name}' ({settings.model_type}) has no vision; supported: {', '.join(FAMILIES)}")
    if settings.model_type not in FAMILIES:
        raise UserError(
            f"base.model '{name}' is of family '{settings.model_type}', for which vismem/models/backbones has no file; "
            f"supported: {', '.join(FAMILIES)}"
        )
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=getattr(torch, config.base.dtype))
    model.save_pretrained(out)
    load_processor(name).save_pretrained(out)
    (out / "metrics.json").write_text(json.dumps({"model": name, "parameters": model.num_parameters()}))
    (out / "loss.json").write_text("[]")
    return f"base: {name}, {model.num_parameters() / 1e9:.2f}B parameters, copied"
