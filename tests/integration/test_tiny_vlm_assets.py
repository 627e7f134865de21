"""The tiny VLM and its memory in assets/, against their cards."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.tiny_vlm import scores
from recipes.tiny_vlm.card import FACTS
from recipes.tiny_vlm.scenes import of_size
from vismem.data.tasks import TASKS
from vismem.files import read_json
from vismem.models.vismem import VisMemModel
from vismem.provenance import sha256_folder

ASSETS = Path(__file__).parents[2] / "assets"
ROUNDING = 0.8  # percentage points: two of 260 answers, which another CPU's rounding may turn


@pytest.mark.parametrize("name", ["tiny-vlm", "tiny-vlm-memory"])
def test_an_asset_s_files_are_those_of_its_card(name: str) -> None:
    tiny.check_card(ASSETS / name)


@pytest.fixture(scope="module")
def asset() -> tuple[Any, Any]:
    folder = ASSETS / "tiny-vlm"
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("size", [(84, 84), (112, 112), (168, 84)])
def test_the_asset_answers_fresh_questions_as_its_card_says_at_several_sizes(
    asset: tuple[Any, Any], size: tuple[int, int]
) -> None:
    facts = read_json(ASSETS / "tiny-vlm" / FACTS)["scores"]
    (name, percent), *_ = scores.score(*asset, facts["questions"], [size]).items()
    assert percent == pytest.approx(facts["sizes"][name], abs=ROUNDING)
    drawn = of_size(facts["questions"], scores.FRESH, *size)
    commonest = {task: _most_frequent([s.answer for s in drawn if s.task == task]) for task in TASKS}
    assert percent > 100 * sum(commonest.values()) / len(drawn) + 20, "far above the commonest answer to each task"


def test_the_asset_answers_the_validation_split_as_its_card_says(asset: tuple[Any, Any]) -> None:
    facts = read_json(ASSETS / "tiny-vlm" / FACTS)["scores"]
    found = scores.score_validation(*asset, facts["validation_questions"])
    assert found == pytest.approx(facts["validation"], abs=ROUNDING)


def test_the_asset_s_memory_was_trained_on_the_asset_and_gains_on_it() -> None:
    facts = read_json(ASSETS / "tiny-vlm-memory" / FACTS)
    assert facts["base_sha256"] == sha256_folder(ASSETS / "tiny-vlm", "*.safetensors")
    assert facts["gain"]["ci95"][0] > 0
    model = VisMemModel.from_pretrained(ASSETS / "tiny-vlm-memory", ASSETS / "tiny-vlm")
    assert model.backbone.family == "qwen2_5_vl"


def _most_frequent(answers: list[str]) -> int:
    return max(answers.count(answer) for answer in set(answers))
