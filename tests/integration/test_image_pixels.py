"""The budget of pixels (`memory.image_pixels`) on every family: what becomes patches, for prompts and memories."""

from pathlib import Path

import pytest
import tiny
import tiny_families
import torch
from test_sizes import large

from vismem.generation.engine import generate
from vismem.generation.invocation import Random
from vismem.generation.prompts import encode, prompt_text
from vismem.models.loading import load_base
from vismem.models.processors import load_processor
from vismem.models.vismem import VisMemModel

# between what a small image and a large one make; of both LLaVAs 7,000
BUDGETS = {"qwen2_5_vl": 19_600, "internvl": 14_000, "internvl_qk": 15_000}


@pytest.fixture(scope="module", params=tiny_families.VARIANTS)
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VisMemModel, int]:
    """A base, VisMem on it with a budget that a large image exceeds, and the budget."""
    base = tiny_families.save_base(tmp_path_factory.mktemp("base"), request.param)
    budget = BUDGETS.get(request.param, 7_000)
    return base, tiny.vismem(base, tiny.MEMORY.model_copy(update={"image_pixels": budget})), budget


def seen(model: VisMemModel, side: int) -> int:
    """Pixels of all patches that are made of an image."""
    return int(encode(model.backbone, [large(side)]).vision.mask.sum()) * tiny_families.PATCH**2


def test_an_image_makes_no_more_patches_than_the_budget_has_pixels(limited: tuple[Path, VisMemModel, int]) -> None:
    base, model, budget = limited
    free = tiny.vismem(base)
    assert seen(model, 500) <= budget < seen(free, 500)
    assert seen(model, 28) == seen(free, 28), "a small one is as it was"
    for side in (28, 500):
        assert sum(model.backbone.patch_counts([(side, side)])) * tiny_families.PATCH**2 == seen(model, side)


def test_hugging_face_s_own_processor_with_the_same_limit_gives_the_same_prompt(
    limited: tuple[Path, VisMemModel, int], tmp_path: Path
) -> None:
    """The one that is saved with the model: who serves it need not know the budget."""
    _, model, _ = limited
    model.save_pretrained(tmp_path)
    processor, sample = load_processor(tmp_path), large(500)
    text = prompt_text(model.backbone.processor, sample)
    encoded = processor(text=[text], images=[tiny_families.pictures(sample)], return_tensors="pt")
    prompt = encode(model.backbone, [sample])
    assert int((encoded["input_ids"] == model.backbone.model.config.image_token_id).sum()) == int(prompt.visual.sum())


def test_a_model_that_is_loaded_again_has_its_budget_and_its_answers(
    limited: tuple[Path, VisMemModel, int], tmp_path: Path
) -> None:
    base, model, _ = limited
    model.save_pretrained(tmp_path)
    again = VisMemModel.from_pretrained(tmp_path, base)
    policy, asked = Random(probability=0.5), [large(500), large(56)]
    answers = [generate(each, asked, policy, max_new_tokens=6) for each in (model, again)]
    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]


def test_a_budget_above_the_processor_s_own_maximum_changes_nothing(limited: tuple[Path, VisMemModel, int]) -> None:
    base, _, _ = limited
    backbone = load_base(base)
    before = encode(backbone, [large(500)]).embeds
    backbone.limit_pixels(10**9)
    assert torch.equal(encode(backbone, [large(500)]).embeds, before)


def test_the_smallest_budget_leaves_one_tile_or_patch(limited: tuple[Path, VisMemModel, int]) -> None:
    base, _, _ = limited
    backbone = load_base(base)
    backbone.limit_pixels(1)
    assert encode(backbone, [large(500)]).visual.any()
