"""The recipe of the tiny VLM, for a few steps."""

import dataclasses
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.tiny_vlm import objectives, train
from recipes.tiny_vlm.card import FACTS
from recipes.tiny_vlm.memory import full_config, train_memory
from recipes.tiny_vlm.objectives import Language, Vision, answer_loss, cell_labels, grids
from recipes.tiny_vlm.scenes import SIDES, of_size, questions
from recipes.tiny_vlm.sequences import IGNORED, lay_out
from recipes.tiny_vlm.train import Settings, train_tiny_vlm
from vismem.config import GrpoConfig, Stage1Config, Stage2Config, WarmStartConfig
from vismem.data.collate import prompt_messages, target_text
from vismem.data.sample import Sample
from vismem.data.scenes import COLOURS, SHAPES
from vismem.data.tasks import TASKS
from vismem.files import read_json
from vismem.generation.prompts import encode
from vismem.models.backbones.qwen2_5_vl import Qwen25VLBackbone
from vismem.models.vismem import VisMemModel, load_base
from vismem.provenance import file_hashes

SETTINGS = Settings(
    size=tiny.SIZE, questions=26, vision_steps=4, language_steps=4, batch_size=4, checkpoint_every=2, scored=2
)
SEED = 3
ORIGIN = {"command": "the command", "git": {"commit": "0123abc", "dirty": False}}


@pytest.fixture(scope="module", autouse=True)
def few_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "VISION_BATCH", 8)
        patch.setattr(train, "SIZES", ((84, 84), (140, 112)))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, few_images: None) -> Path:
    return train_tiny_vlm(tmp_path_factory.mktemp("recipe") / "made", SEED, SETTINGS, ORIGIN)


@pytest.fixture(scope="module")
def backbone(made: Path) -> Qwen25VLBackbone:
    loaded = load_base(made)
    assert isinstance(loaded, Qwen25VLBackbone)
    return loaded


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Single and double images of several sizes."""
    return questions(26, SEED)


# --- the questions ---------------------------------------------------------------------------------------------------


def test_half_of_the_pictures_are_squares_of_84_pixels_and_the_others_of_all_sizes() -> None:
    sizes = [Image.open(io.BytesIO(sample.images[0])).size for sample in questions(200, 0)]
    assert sizes[:100] == [(84, 84)] * 100
    assert {side for size in sizes[100:] for side in size} == set(SIDES)
    assert len(set(sizes[100:])) == len(SIDES) ** 2
    assert {sample.task for sample in questions(200, 0)[100:]} == set(TASKS)
    assert questions(26, 1) == questions(26, 1) != questions(26, 2)


@pytest.mark.parametrize("size", [(84, 84), (168, 168), (112, 140), (168, 84)])
def test_a_cell_s_label_is_what_is_painted_at_the_centre_of_its_visual_token(size: tuple[int, int]) -> None:
    for sample in of_size(13, 0, *size):
        image = Image.open(io.BytesIO(sample.images[0])).convert("RGB")
        ((height, width), *_) = grids(sample)
        labels = cell_labels(sample.scene_truth()[0], height, width).view(height, width, 4)
        for thing in sample.scene_truth()[0]["objects"]:
            row, column = thing["row"], thing["column"]
            shown = labels[(labels[..., 2] == row) & (labels[..., 3] == column)]
            assert len(shown), "every cell has a token"
            wanted = [1 + list(COLOURS).index(thing["colour"]), 1 + SHAPES.index(thing["shape"])]
            assert (shown[:, :2] == torch.tensor(wanted)).all()
            painted = image.getpixel((int((column + 0.5) * size[0] / 3), int((row + 0.5) * size[1] / 3)))
            assert max(abs(a - b) for a, b in zip(painted, COLOURS[thing["colour"]], strict=True)) < 30


def test_every_delimiter_is_a_token_of_its_own(backbone: Qwen25VLBackbone) -> None:
    tokenizer = backbone.processor.tokenizer
    text = "red circle, blue star; top row: 2. answer: yes"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert [token for token in tokens if not token.strip("Ġ").isalnum()] == [",", ";", ":", "Ġ", ".", ":"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    special = ["<|im_start|>", "<|image_pad|>", "<|im_end|>"]
    assert tokenizer("".join(special))["input_ids"] == tokenizer.convert_tokens_to_ids(special)


# --- sequences and objectives ----------------------------------------------------------------------------------------


def test_sequences_score_as_hugging_face_scores_the_same_text(
    backbone: Qwen25VLBackbone, samples: list[Sample]
) -> None:
    processor, theirs = backbone.processor, 0.0
    with torch.no_grad():
        ours = answer_loss(backbone, lay_out(backbone, samples, None))
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


@torch.no_grad()
def test_images_shown_again_are_those_of_the_prompt_and_only_the_answer_is_learnt(
    backbone: Qwen25VLBackbone, samples: list[Sample]
) -> None:
    plain, again = lay_out(backbone, samples, None), lay_out(backbone, samples, random.Random(1))
    prompt = encode(backbone, samples)
    for row, sample in enumerate(samples):
        before, after = plain.labels[row], again.labels[row]
        assert torch.equal(before[before != IGNORED], after[after != IGNORED]), "the same words in the same order"
        length, start = int(again.mask[row].sum()), int(prompt.mask[row].sum())
        assert length > plain.mask[row].sum()
        seen = prompt.embeds[row][prompt.visual[row]]
        shown = (again.embeds[row, start:length, None] == seen).all(-1).any(1)
        assert shown.sum() >= len(seen) // 2
        assert not (shown & (torch.roll(after, 1)[start:length] != IGNORED)).any(), "no image token is to be said"
        axes = again.positions[:, row, start:length]
        assert (axes.amax(0)[1:] >= axes.amin(0)[:-1]).all(), f"time goes forward in {sample.id}"


def test_a_block_stands_where_hugging_face_places_an_image_of_its_own(
    backbone: Qwen25VLBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.tiny_vlm.sequences.STRIP_SHARE", 0.0)
    monkeypatch.setattr("recipes.tiny_vlm.sequences.MAX_SHOWN", 1)
    samples = of_size(4, 0, 84, 84)
    again = lay_out(backbone, samples, random.Random(0))
    for row, sample in enumerate(samples):
        prompt = encode(backbone, [sample])
        seen = prompt.embeds[0][prompt.visual[0]]
        visual = (again.embeds[row][:, None] == seen).all(-1).any(1).int()
        count = 2 * len(grids(sample))
        assert int(visual.sum()) == 9 * count
        positions, _ = backbone.model.model.get_rope_index(
            torch.where(visual == 1, backbone.model.config.image_token_id, 0)[None],
            mm_token_type_ids=visual[None],
            image_grid_thw=torch.tensor([[1, 6, 6]] * count),
            attention_mask=again.mask[row : row + 1].long(),
        )
        length = int(again.mask[row].sum())
        assert torch.equal(positions[:, 0, :length], again.positions[:, row, :length])


def test_each_phase_trains_its_own_part_and_lowers_its_loss(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, vision_steps=30, language_steps=30)
    out = train_tiny_vlm(tmp_path / "made", SEED, settings, ORIGIN)
    for phase in ("vision", "language"):
        lines = [line.split(",") for line in (out / f"{phase}.csv").read_text().splitlines()[1:]]
        assert len(lines) == 30
        assert float(lines[-1][1]) < 0.8 * float(lines[0][1])


def test_chunks_of_a_batch_change_the_speed_but_not_the_gradient(
    backbone: Qwen25VLBackbone, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    for objective in (Vision(backbone, samples, 0), Language(backbone, samples, 0, 8, 1.0)):
        found = []
        for chunk in (16, 3):
            monkeypatch.setattr(objectives, "CHUNK", chunk)
            batch = objective.collect(0)
            if isinstance(batch, tuple):
                batch = (batch[0], None)  # what is drawn while laying out depends on the order only
            backbone.model.zero_grad()
            loss = objective.backward(batch)["loss"]  # type: ignore[arg-type]
            weights = {name: p.grad for name, p in backbone.model.named_parameters() if p.grad is not None}
            found.append((loss, {name: grad.clone() for name, grad in weights.items()}))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        assert found[0][1].keys() == found[1][1].keys()
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(gradient, found[1][1][name], atol=1e-5, rtol=1e-3, msg=name)


# --- the run ---------------------------------------------------------------------------------------------------------


def test_the_folder_opens_with_auto_classes_and_is_scored_and_complete(made: Path) -> None:
    assert type(AutoModelForImageTextToText.from_pretrained(made)).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(AutoProcessor.from_pretrained(made)).__name__ == "Qwen2_5_VLProcessor"
    facts = read_json(made / FACTS)
    assert set(facts["scores"]["sizes"]) == {"84 x 84", "140 x 112"}
    assert facts["command"] == "the command"
    tiny.check_card(made)
    assert not list(made.glob("*.checkpoint"))
    assert [path.name for path in made.parent.iterdir()] == ["made"]


def test_the_same_seed_gives_the_same_files_and_another_seed_other_weights(made: Path, tmp_path: Path) -> None:
    again = train_tiny_vlm(tmp_path / "again", SEED, SETTINGS, ORIGIN)
    assert file_hashes(again) == file_hashes(made)
    other = train_tiny_vlm(tmp_path / "other", SEED + 1, SETTINGS, ORIGIN)
    assert file_hashes(other)["model.safetensors"] != file_hashes(made)["model.safetensors"]


@pytest.mark.parametrize("at", range(8))
def test_a_run_killed_at_any_step_and_resumed_equals_the_one_that_was_not(
    at: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_or_die(*arguments: Any, **more: Any) -> Tensor:  # gradients are made, the weights not yet moved
        calls.append(len(calls))
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return clip(*arguments, **more)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_die)
    out = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        train_tiny_vlm(out, SEED, SETTINGS, ORIGIN)
    assert not out.exists()
    train_tiny_vlm(out, SEED, SETTINGS, ORIGIN)
    assert len(calls) - (at + 1) <= 8 - at + 1, "it resumed from a checkpoint"
    assert file_hashes(out) == file_hashes(made)


def test_a_killed_run_of_another_seed_is_not_resumed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("recipes.tiny_vlm.train.score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_tiny_vlm(tmp_path / "made", SEED + 1, SETTINGS, ORIGIN)
    out = train_tiny_vlm(tmp_path / "made", SEED, SETTINGS, ORIGIN)
    assert file_hashes(out) == file_hashes(made)


def test_a_memory_is_trained_on_it_by_the_library_s_own_steps(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.tiny_vlm.memory.VALIDATION", 13)
    config = full_config(made, SEED)
    source = config.prepare.sources[0].model_copy(update={"train": 13})
    config = config.model_copy(
        update={
            "prepare": config.prepare.model_copy(update={"sources": (source,)}),
            "memory": tiny.MEMORY,
            "grpo": GrpoConfig(batch_size=2, max_new_tokens=4),
            "stage1": Stage1Config(steps=1, group_size=2, warm_start=WarmStartConfig(steps=1, batch_size=2)),
            "stage2": Stage2Config(steps=1, group_size=2),
        }
    )
    out = train_memory(tmp_path / "memory", made, config, ORIGIN)
    tiny.check_card(out)
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    assert read_json(out / FACTS)["questions"] == 13
    assert VisMemModel.from_pretrained(out, made).memory_config == tiny.MEMORY
