"""Where memories looked, as the step `evaluate` finds it out for its report: what the playground shows of them."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from vismem.config import Config, EvaluateConfig
from vismem.data.sample import write_shards
from vismem.evaluation.arms import ARMS
from vismem.evaluation.decoding import decode
from vismem.evaluation.evaluate import evaluate
from vismem.evaluation.looks import find_looks
from vismem.evaluation.predictions import predictions_file, read_predictions
from vismem.generation.torch_executor import TorchExecutor
from vismem.generation.types import Rollout
from vismem.models.attention import Look
from vismem.models.vismem import VisMemModel
from vismem.records import VISMEM
from vismem.serving.answering import Runtime

CONFIG = Config(seed=3, evaluate=EvaluateConfig(batch_size=4, max_new_tokens=10, bootstrap=100))
SAMPLES = [sample for sample in tiny.samples() if len(sample.images) == 1]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    model = tiny.vismem(tiny_base)
    with torch.no_grad():
        model.tokens.bias += 5.0  # it then invokes now and then
    return model


@pytest.fixture(scope="module")
def answered(model: VisMemModel) -> list[Rollout]:
    rollouts = decode({VISMEM: model}, [ARMS[VISMEM]], SAMPLES, CONFIG)[VISMEM].rollouts
    assert len({len(rollout.invocations) for rollout in rollouts}) > 1
    return rollouts


def find(model: VisMemModel, answered: list[Rollout]) -> dict[int, list[Look]]:
    return find_looks(model, dict(enumerate(SAMPLES)), answered, CONFIG)


def test_every_memory_has_the_look_that_it_has_alone(model: VisMemModel, answered: list[Rollout]) -> None:
    found = find(model, answered)
    assert {place: len(looks) for place, looks in found.items()} == {
        place: len(rollout.invocations) for place, rollout in enumerate(answered)
    }
    runtime = Runtime(TorchExecutor(model))
    try:
        for place, sample in enumerate(SAMPLES[:5]):
            alone: list[Look] = []
            picture = Image.open(io.BytesIO(sample.images[0]))
            list(runtime.generate([picture], sample.question, max_new_tokens=10, looks=alone))
            assert [look.share for look in alone] == pytest.approx([look.share for look in found[place]], abs=1e-5)
    finally:
        runtime.close()


def test_an_answer_that_comes_out_otherwise_has_no_looks(model: VisMemModel, answered: list[Rollout]) -> None:
    (place, *_) = [place for place, rollout in enumerate(answered) if rollout.invocations]
    changed = list(answered)
    changed[place] = replace(answered[place], invocations=answered[place].invocations[1:])
    assert set(find(model, changed)) == set(range(len(SAMPLES))) - {place}


def test_the_steps_page_shows_the_look_of_each_memory_of_an_answer(
    model: VisMemModel, tiny_base: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "stage2")
    write_shards(SAMPLES, tmp_path / "validate" / "data" / "test")
    inputs = {"base": tiny_base, "stage2": tmp_path / "stage2", "validate": tmp_path / "validate"}
    (tmp_path / "out").mkdir()
    evaluate(CONFIG, inputs, tmp_path / "out")
    answers = (tmp_path / "out" / "report.html").read_text().partition('id="answers"')[2]
    chips = re.findall(r'<button type="button" class="chip \w+" data-tip="\d+ %[^"]*" data-maps="url\(data:', answers)
    rows = read_predictions(predictions_file(tmp_path / "out", VISMEM))
    assert len(chips) == sum(len(row.invocations) for row in rows) > 0
    assert '<span class="chip' not in answers, "vanilla has no memories, and each of VisMem's has a look"
