"""The step `base`: the embedded model is trained, opens with Hugging Face's loaders, and resumes exactly."""

import dataclasses
import io
import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from vismem.config import Config, ScenesSource
from vismem.data.collate import prompt_messages, target_text
from vismem.data.sample import Sample, read_samples, write_shards
from vismem.data.scenes import generate
from vismem.data.tasks import TASKS
from vismem.errors import UserError
from vismem.models.backbones.qwen2_5_vl import Qwen25VLBackbone
from vismem.training import pretraining
from vismem.training.base import answer, base
from vismem.training.sequences import IGNORED, Batch, Encoder, collate

TINY = {
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "vision_width": 32,
    "vision_layers": 2,
    "vision_steps": 6,
    "steps": 6,
    "batch_size": 8,
}
CONFIG = Config.model_validate({"base": TINY})
SOURCE = ScenesSource(pretrain=39, train=0, validation=13, test=0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("validate")
    for split in ("pretrain", "validation"):
        write_shards(generate(SOURCE, split, seed=0), folder / "data" / split)
    return {"validate": folder}


@pytest.fixture(scope="module")
def made(inputs: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    line = base(CONFIG, inputs, out)
    assert "validation questions" in line
    return out


@pytest.fixture(scope="module")
def backbone(made: Path) -> Qwen25VLBackbone:
    model = AutoModelForImageTextToText.from_pretrained(made)
    return Qwen25VLBackbone(model, AutoProcessor.from_pretrained(made))


def lay_out(backbone: Qwen25VLBackbone, samples: list[Sample], rng: random.Random | None) -> tuple[Batch, Encoder]:
    encoder = Encoder(backbone.processor)
    settings = backbone.model.config
    block = (settings.vision_start_token_id, settings.image_token_id, settings.vision_end_token_id)
    records = [encoder.encode(sample) for sample in samples]
    return collate(records, block, settings.text_config.pad_token_id, rng), encoder


def test_the_folder_opens_with_auto_classes_and_generates(made: Path, inputs: Mapping[str, Path]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(made)
    processor = AutoProcessor.from_pretrained(made)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    samples = read_samples(inputs["validate"] / "data" / "validation")
    texts = answer(model, processor, samples, max_new_tokens=5)
    assert texts == [answer(model, processor, [sample], max_new_tokens=5)[0] for sample in samples]


def test_metrics_and_loss_curve_are_written_and_no_checkpoint_is_left(made: Path) -> None:
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["n"] == 13
    assert set(metrics["tasks"]) == set(TASKS)
    curve = json.loads((made / "loss.json").read_text())
    assert [(point["phase"], point["step"]) for point in curve] == [
        ("vision", 0),
        ("vision", 5),
        ("language", 0),
        ("language", 5),
    ]
    assert not list(made.glob("*.checkpoint*"))


def test_every_delimiter_is_a_token_of_its_own(backbone: Qwen25VLBackbone) -> None:
    tokenizer = backbone.processor.tokenizer
    text = "red circle, blue star; top row: 2. answer: yes"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert [token for token in tokens if not token.strip("Ġ").isalnum()] == [",", ";", ":", "Ġ", ".", ":"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|><|image_pad|><|im_end|>")["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["<|im_start|>", "<|image_pad|>", "<|im_end|>"]
    )


def test_training_sequences_score_as_hugging_face_scores_the_same_text(
    backbone: Qwen25VLBackbone, inputs: Mapping[str, Path]
) -> None:

    samples = read_samples(inputs["validate"] / "data" / "validation")
    batch, encoder = lay_out(backbone, samples, None)
    with torch.no_grad():
        ours = pretraining.answer_loss(backbone, batch, pretraining.image_features(backbone, encoder))
        processor, theirs = backbone.processor, 0.0
        for sample in samples:
            prompt = processor.apply_chat_template(prompt_messages(sample), tokenize=False, add_generation_prompt=True)
            images = [Image.open(io.BytesIO(image)) for image in sample.images]
            text = prompt + target_text(sample) + "<|im_end|>"
            encoded = processor(text=[text], images=images, return_tensors="pt")
            logits = backbone.model(**encoded).logits[0, :-1].log_softmax(-1)
            count = len(processor.tokenizer(target_text(sample))["input_ids"]) + 1
            wanted = encoded["input_ids"][0, 1:]
            theirs -= float(logits[torch.arange(len(wanted)), wanted][-count:].sum())
    assert float(ours) == pytest.approx(theirs, rel=1e-5)


def test_images_shown_again_stand_where_hugging_face_would_place_them(
    backbone: Qwen25VLBackbone, inputs: Mapping[str, Path]
) -> None:
    samples = read_samples(inputs["validate"] / "data" / "pretrain")
    plain, _ = lay_out(backbone, samples, None)
    batch, _ = lay_out(backbone, samples, random.Random(0))
    kinds = (batch.features >= 0).int() * batch.mask.int()
    grid = torch.tensor([[1, 6, 6]] * int(kinds.sum() // 9))
    positions, _ = backbone.model.model.get_rope_index(
        batch.ids, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=batch.mask
    )
    assert torch.equal(positions * batch.mask, batch.positions * batch.mask)
    for sample, row in zip(samples, batch.features, strict=True):
        seen = row[row >= 0].view(-1, 9 * len(sample.images))
        assert len(seen) == 2
        assert torch.equal(seen[0], seen[1])
    image = backbone.model.config.image_token_id
    assert torch.equal(batch.features >= 0, batch.ids == image)
    assert torch.equal(torch.sort(batch.labels.flatten())[0][-200:], torch.sort(plain.labels.flatten())[0][-200:])
    assert not torch.isin(batch.labels[batch.labels != IGNORED], torch.tensor([image])).any()


def test_cached_features_equal_those_of_the_model(backbone: Qwen25VLBackbone, inputs: Mapping[str, Path]) -> None:

    samples = read_samples(inputs["validate"] / "data" / "validation")
    _, encoder = lay_out(backbone, samples, None)
    table = pretraining.image_features(backbone, encoder)
    images = [Image.open(io.BytesIO(image)) for sample in samples for image in sample.images]
    encoded = backbone.processor.image_processor(images=images, return_tensors="pt")
    with torch.no_grad():
        features = backbone.model.get_image_features(**encoded).pooler_output
    torch.testing.assert_close(table, torch.cat(list(features)), atol=1e-5, rtol=1e-4)


def test_chunks_of_a_batch_change_the_speed_but_not_the_result(
    inputs: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate({"base": {**TINY, "matrix_learning_rate": 0}})  # Muon would amplify rounding
    losses = []
    for chunk in (16, 3):
        monkeypatch.setattr(pretraining, "CHUNK", chunk)
        out = tmp_path / str(chunk)
        out.mkdir()
        base(config, inputs, out)
        losses.append([point["loss"] for point in json.loads((out / "loss.json").read_text())])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_training_lowers_the_loss_of_vision_and_language(inputs: Mapping[str, Path], tmp_path: Path) -> None:
    longer = Config.model_validate({"base": {**TINY, "vision_steps": 40, "steps": 40}})
    base(longer, inputs, tmp_path)
    for phase in ("vision", "language"):
        curve = [p["loss"] for p in json.loads((tmp_path / "loss.json").read_text()) if p["phase"] == phase]
        assert curve[-1] < 0.8 * curve[0]


def test_a_model_from_a_path_is_copied_with_its_weights(made: Path, tmp_path: Path) -> None:
    config = Config.model_validate({"base": {"model": str(made)}})
    base(config, {}, tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.chat_template
    old, new = load_file(made / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_base_without_vision_or_that_is_missing_is_refused(tmp_path: Path) -> None:
    text_only = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    text_only.save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=r"has no vision; supported: .*qwen2_5_vl"):
        base(Config.model_validate({"base": {"model": str(tmp_path / "llama")}}), {}, tmp_path / "out")
    with pytest.raises(UserError, match="no model that can be loaded"):
        base(Config.model_validate({"base": {"model": str(tmp_path / "nowhere")}}), {}, tmp_path / "out")


def test_the_embedded_base_needs_scenes_in_pretrain(inputs: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pretrain"):
        base(CONFIG, {"validate": tmp_path}, tmp_path)
    samples = read_samples(inputs["validate"] / "data" / "pretrain")
    blind = [dataclasses.replace(sample, scene="") for sample in samples]
    write_shards(blind, tmp_path / "data" / "pretrain")
    write_shards(samples, tmp_path / "data" / "validation")
    with pytest.raises(UserError, match="learns to see from generated scenes"):
        base(CONFIG, {"validate": tmp_path}, tmp_path)
