"""What the recipe of the tiny VLM shows: its pictures, their labels, and the sequences that the model learns from."""

import dataclasses
import io
import random
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from recipes.tiny_vlm import objectives, scenes
from recipes.tiny_vlm.model import build_model, build_processor
from recipes.tiny_vlm.objectives import NOTHING, Language, Vision, answer_loss, cell_labels
from recipes.tiny_vlm.scenes import SIDES, of_size, questions
from recipes.tiny_vlm.sequences import (
    FIRST_BLOCK_SHARE,
    SLOTS,
    WHOLE_SHARE,
    Page,
    Table,
    _strip,
    grids,
    lay_out,
    pages,
    stack,
)
from recipes.tiny_vlm.train import SHARES
from vismem.data.collate import prompt_messages, target_text
from vismem.data.sample import Sample
from vismem.data.scenes import draw, layouts_of
from vismem.data.tasks import TASKS
from vismem.data.tasks.layouts import COLOURS, SHAPES, TEXTURES
from vismem.generation.prompts import encode
from vismem.models.backbones.qwen2_5_vl import Qwen25VLBackbone

SEED = 3


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Qwen25VLBackbone:
    """Untrained."""
    drawn = questions(46, SEED)
    processor = build_processor(text for s in drawn for text in (s.question, target_text(s)))
    return Qwen25VLBackbone(build_model(tiny.SIZE, processor, SEED), processor)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Single and double images of several sizes."""
    return questions(46, SEED)


# --- the questions ---------------------------------------------------------------------------------------------------


def test_most_pictures_have_168_pixels_a_side_and_the_others_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "BLOCK", 46)
    drawn = questions(4 * 46, 0)
    sizes = [Image.open(io.BytesIO(sample.images[0])).size for sample in drawn]
    assert set(sizes[46:]) == {(168, 168)}
    assert set(sizes[:46]) == {(side, side) for side in SIDES}
    assert {sample.task for sample in drawn[:46]} == set(TASKS)
    assert len({sample.id for sample in drawn}) == len(drawn)
    assert questions(26, 1) == questions(26, 1) != questions(26, 2)


@pytest.mark.parametrize("side", SIDES)
def test_a_cell_s_label_is_what_is_painted_at_the_centre_of_its_visual_token(side: int) -> None:
    for sample in of_size(13, 0, side):
        image = Image.open(io.BytesIO(sample.images[0])).convert("RGB").resize((side // 2,) * 2, Image.Resampling.BOX)
        ((height, width), *_) = grids(sample)
        layout, *_ = layouts_of(sample)
        labels = cell_labels(layout, height, width)
        for thing in layout:
            row, column = divmod(thing.cell, 3)
            shown = labels[(labels[:, 3] == row) & (labels[:, 4] == column)]
            assert len(shown), "every cell has a token"
            wanted = [1 + list(COLOURS).index(thing.colour), 1 + SHAPES.index(thing.shape)]
            assert (shown[:, :3] == torch.tensor([*wanted, TEXTURES.index(thing.texture)])).all()
            painted = image.getpixel((int((column + 0.5) * side / 6), int((row + 0.5) * side / 6)))
            assert max(abs(a - b) for a, b in zip(painted, COLOURS[thing.colour], strict=True)) < 30
        assert (cell_labels(layout, height, width, textures=False)[:, 2] == NOTHING).all()


@torch.no_grad()
def test_a_coarse_prompt_shows_nothing_of_the_textures_and_the_whole_picture_does(backbone: Qwen25VLBackbone) -> None:
    (sample,) = of_size(1, 0, 168)
    (layout,) = layouts_of(sample)
    backbone.prompt_pixels = 84 * 84
    tokens = []
    for texture in TEXTURES:
        image = draw(tuple(dataclasses.replace(thing, texture=texture) for thing in layout), 168, random.Random(0))
        views = [encode(backbone, [dataclasses.replace(sample, images=(image,))], whole) for whole in (False, True)]
        tokens.append([view.embeds[view.visual] for view in views])
    (coarse, whole), *others = tokens
    assert [len(coarse), len(whole)] == [9, 36]
    for other_coarse, other_whole in others:
        assert (other_coarse - coarse).norm() < 0.05 * coarse.norm()
        assert (other_whole - whole).norm() > 5 * (other_coarse - coarse).norm()


def test_every_delimiter_is_a_token_of_its_own(backbone: Qwen25VLBackbone) -> None:
    tokenizer = backbone.processor.tokenizer
    text = "red circle, blue star; top row: 2. answer: yes"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert [token for token in tokens if not token.strip("Ġ").isalnum()] == [",", ";", ":", "Ġ", ".", ":"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    special = ["<|im_start|>", "<|image_pad|>", "<|im_end|>"]
    assert tokenizer("".join(special))["input_ids"] == tokenizer.convert_tokens_to_ids(special)


@pytest.fixture(scope="module")
def laid(backbone: Qwen25VLBackbone, samples: list[Sample]) -> tuple[list[Page], Tensor]:
    backbone.prompt_pixels = 84 * 84
    return pages(backbone, samples)


@pytest.mark.parametrize("whole", [False, True])
def test_sequences_score_as_hugging_face_scores_the_same_text(
    backbone: Qwen25VLBackbone, samples: list[Sample], whole: bool
) -> None:
    processor, theirs = backbone.processor, 0.0
    backbone.prompt_pixels = None if whole else 84 * 84
    with torch.no_grad():
        made, features = pages(backbone, samples)
        ours = answer_loss(backbone, stack(backbone, features, [lay_out(page, None) for page in made]))
        for sample in samples:
            prompt = processor.apply_chat_template(prompt_messages(sample), tokenize=False, add_generation_prompt=True)
            images = [Image.open(io.BytesIO(image)) for image in sample.images]
            if not whole:
                images = [image.resize((84, 84), Image.Resampling.BICUBIC) for image in images]
            text = prompt + target_text(sample) + "<|im_end|>"
            encoded = processor(text=[text], images=images, return_tensors="pt")
            logits = backbone.model(**encoded).logits[0, :-1].log_softmax(-1)
            count = len(processor.tokenizer(target_text(sample))["input_ids"]) + 1
            wanted = encoded["input_ids"][0, 1:]
            theirs -= float(logits[torch.arange(len(wanted)), wanted][-count:].sum())
    assert float(ours) == pytest.approx(theirs, rel=1e-5)


def test_looks_show_the_whole_images_tokens_and_only_the_answer_is_learnt(
    laid: tuple[list[Page], Tensor], samples: list[Sample]
) -> None:
    seen = Counter[str]()
    for page, sample in zip(laid[0], samples, strict=True):
        plain = lay_out(page, None)
        assert page.whole[:, 1].nonzero()[0].size == page.coarse[:, 1].nonzero()[0].size, "the same words"
        assert len(page.images) == (page.whole[:, 0] > 0).sum()
        assert set(np.concatenate(page.objects)) <= set(page.images)
        for draw_ in range(20):
            table = lay_out(page, random.Random(f"{sample.id}/{draw_}"))
            assert table[table[:, 2] > 0, 1].tolist() == plain[plain[:, 2] > 0, 1].tolist(), "the same answer"
            assert not (table[:, 0] > 0)[table[:, 2] > 0].any(), "no image token is to be said"
            prompt = page.whole if np.array_equal(table[: len(page.whole)], page.whole) else page.coarse
            rest = table[len(prompt) :]
            seen["whole" if prompt is page.whole else "coarse"] += 1
            shown = rest[rest[:, 0] > 0, 0] - 1
            assert set(shown) <= set(page.images)
            seen["looks"] += bool(len(shown))
            axes = rest[:, 3:]
            assert (axes.max(1)[1:] >= axes.min(1)[:-1]).all(), f"time goes forward in {sample.id}"
    assert min(seen["whole"], seen["coarse"], seen["looks"]) > 0.15 * 20 * len(samples)


def test_a_question_that_needs_detail_is_asked_so_that_it_can_be_answered(laid: tuple[list[Page], Tensor]) -> None:
    seen = Counter[str]()
    for number, page in enumerate(laid[0]):
        plain = lay_out(page, None)
        for draw_ in range(40):
            asked, otherwise = (lay_out(page, random.Random(f"{number}/{draw_}"), is_) for is_ in (True, False))
            assert asked[asked[:, 2] > 0, 1].tolist() == plain[plain[:, 2] > 0, 1].tolist(), "the same answer"
            if page.need != "detail":
                assert np.array_equal(asked, otherwise)
                continue
            assert (asked[:, 0] > 0).sum() >= (page.coarse[:, 0] > 0).sum()
            if np.array_equal(asked[: len(page.whole)], page.whole):
                seen["whole"] += 1
                assert np.array_equal(asked, otherwise)
                continue
            first = int(asked[:, 2].argmax())  # of the answer's own tokens
            look = asked[len(page.coarse) : first]
            assert set(look[look[:, 0] > 0, 0] - 1) <= set(page.images)
            assert (look[:, 0] > 0).any(), "a look, before a word is said"
            seen["block" if len(look) == page.block.stop - page.block.start else "strip"] += 1
    assert sum(seen.values()) >= 40 * 10
    assert seen["whole"] / sum(seen.values()) == pytest.approx(WHOLE_SHARE, abs=0.06)
    assert seen["block"] / (seen["block"] + seen["strip"]) == pytest.approx(FIRST_BLOCK_SHARE, abs=0.06)


@pytest.mark.parametrize(("phase", "shares"), SHARES.items())
def test_each_phase_asks_its_shares_of_the_questions_and_each_of_a_need_as_often_as_the_others(
    backbone: Qwen25VLBackbone,
    laid: tuple[list[Page], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    shares: dict[str, float],
) -> None:
    drawn: list[int] = []

    def lay(page: Page, rng: random.Random, answerable: bool) -> Table:
        assert answerable == ("detail" in shares)
        drawn.append(next(number for number, other in enumerate(laid[0]) if other is page))
        return lay_out(page, rng, answerable)

    monkeypatch.setattr(objectives, "lay_out", lay)
    Language(backbone, *laid, 0, 4000, phase, shares).collect(0)
    counts, number_of = Counter(drawn), Counter(page.need for page in laid[0])
    others = sum(number for need, number in number_of.items() if need not in shares)
    for need, number in number_of.items():
        size = shares.get(need, (1 - sum(shares.values())) * number / others)
        of_need = [at for at, page in enumerate(laid[0]) if page.need == need]
        assert sum(counts[at] for at in of_need) / 4000 == pytest.approx(size, abs=0.025)
        for at in of_need:
            assert counts[at] == pytest.approx(4000 * size / number, rel=0.6)


def test_a_strip_shows_some_objects_or_scattered_tokens_in_order(laid: tuple[list[Page], Tensor]) -> None:
    page = next(page for page in laid[0] if len(page.objects) > 4)
    lengths, whole_objects = set(), 0
    for seed in range(200):
        table = _strip(page, random.Random(seed))
        places = table[1:-1, 0] - 1
        lengths.add(len(places))
        assert table[[0, -1], 1].tolist() == [page.line_break] * 2
        assert (np.diff(places) >= 0).all()
        assert (np.diff(table[:, 3:], axis=0) == 1).all()
        named = [tokens for tokens in page.objects if set(tokens) & set(places)]
        whole_objects += set(places) <= set(np.concatenate(named)) if named else 0
    assert lengths == set(range(SLOTS[0], SLOTS[1] + 1))
    assert 100 < whole_objects < 190


def test_a_block_stands_where_hugging_face_places_an_image_of_its_own(
    backbone: Qwen25VLBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "WHOLE_SHARE": 1.0,
        "PLAIN_SHARE": 0.0,
        "OFTEN": (1.0,),
        "BLOCK_SHARE": 1.0,
        "MAX_SHOWN": 1,
    }.items():
        monkeypatch.setattr(f"recipes.tiny_vlm.sequences.{name}", value)
    samples = of_size(4, 0, 84)
    made, _ = pages(backbone, samples)
    for page, sample in zip(made, samples, strict=True):
        table = torch.from_numpy(lay_out(page, random.Random(0)))
        visual = (table[:, 0] > 0).int()
        count = 2 * len(grids(sample))
        assert int(visual.sum()) == 9 * count
        positions, _ = backbone.model.model.get_rope_index(
            torch.where(visual == 1, backbone.model.config.image_token_id, 0)[None],
            mm_token_type_ids=visual[None],
            image_grid_thw=torch.tensor([[1, 6, 6]] * count),
            attention_mask=torch.ones(1, len(table)).long(),
        )
        assert torch.equal(positions[:, 0].T, table[:, 3:].long())


def test_chunks_of_a_batch_change_the_speed_but_not_the_gradient(
    backbone: Qwen25VLBackbone, samples: list[Sample], laid: tuple[list[Page], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone.prompt_pixels = 84 * 84
    backbone.model.requires_grad_(True)
    for objective in (Vision(backbone, samples, 0), Language(backbone, *laid, 0, 8)):
        found = []
        for chunk in (16, 3):
            monkeypatch.setitem(objectives.CHUNK, "cpu", chunk)
            backbone.model.zero_grad()
            loss = objective.backward(objective.collect(0))["loss"]  # type: ignore[arg-type]
            weights = {name: p.grad for name, p in backbone.model.named_parameters() if p.grad is not None}
            found.append((loss, {name: grad.clone() for name, grad in weights.items()}))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        assert found[0][1].keys() == found[1][1].keys()
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(gradient, found[1][1][name], atol=1e-5, rtol=1e-3, msg=name)


def test_coarse_images_are_to_say_no_texture(backbone: Qwen25VLBackbone, samples: list[Sample]) -> None:
    backbone.prompt_pixels = 84 * 84
    vision = Vision(backbone, samples, 0)
    for whole in (True, False):
        labels = torch.cat([vision._labels(sample, whole) for sample in samples if grids(sample)[0] == (6, 6)])
        assert bool((labels[:, 2] != NOTHING).any()) == whole
        shown = encode(backbone, [sample for sample in samples if grids(sample)[0] == (6, 6)], whole)
        assert len(labels) == int(shown.visual.sum())
