"""The step `evaluate` and validation questions of a training, shared by processes: the same bytes as of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from vismem.config import Config, EvaluateConfig
from vismem.data.sample import write_shards
from vismem.errors import UserError
from vismem.evaluation import decoding as module
from vismem.evaluation.decoding import ANSWERS
from vismem.launch import LaunchConfig, launch_step
from vismem.launch.torchrun import run_processes
from vismem.ranks import join_ranks
from vismem.steps import run_step

ARMS = ("vanilla", "vismem", "random_50", "shuffled")  # the last one's answers depend on the batch
CONFIG = Config(seed=3, evaluate=EvaluateConfig(arms=ARMS, batch_size=3, max_new_tokens=8, bootstrap=100))
TWO = LaunchConfig("torchrun", num_processes=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("artifacts")
    model = tiny.vismem(tiny_base)
    with torch.no_grad():
        model.tokens.bias += 5.0  # it invokes now and then
    model.save_pretrained(root / "stage2")
    write_shards(tiny.samples(), root / "validate" / "data" / "test")
    return {"base": tiny_base, "stage2": root / "stage2", "validate": root / "validate"}


@pytest.fixture(scope="module")
def one(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    artifacts = tmp_path_factory.mktemp("one")
    run_step("evaluate", CONFIG, artifacts, inputs)
    return artifacts / "evaluate"


def assert_same(one: Path, other: Path) -> None:
    for arm in ARMS:
        file = f"predictions/{arm}.parquet"
        assert (one / file).read_bytes() == (other / file).read_bytes(), arm
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (one, other))
    for figures in (first, second):
        del figures["overhead"]
        for arm in figures["arms"].values():
            assert arm.pop("seconds_per_sample") > 0
    assert first == second
    assert sorted(path.name for path in one.rglob("*")) == sorted(path.name for path in other.rglob("*"))


def test_two_processes_evaluate_as_one_does_to_the_byte(inputs: dict[str, Path], one: Path, tmp_path: Path) -> None:
    line = launch_step("evaluate", CONFIG, tmp_path, inputs, TWO)
    assert "12 test questions" in line
    assert_same(one, tmp_path / "evaluate")


def test_what_two_processes_answered_before_they_were_killed_one_process_goes_on_behind(
    inputs: dict[str, Path], one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files say which batches are done, whoever goes on."""
    partial, answer, batches = tmp_path / "evaluate.partial", module._answer, []

    def answer_until_killed(model: Any, arm: Any, samples: Any, *more: Any) -> Any:
        batches.append(samples[0].id)
        if len(batches) > 2 * len(ARMS):  # warm-up and a batch
            raise KeyboardInterrupt
        return answer(model, arm, samples, *more)

    monkeypatch.setattr(module, "KEEP_EVERY", 0.0)
    for rank in (1, 0):
        batches.clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, "_answer", answer_until_killed)
            patch.setattr("accelerate.Accelerator.process_index", rank)
            with pytest.raises(KeyboardInterrupt):
                run_step("evaluate", CONFIG, tmp_path, inputs)
    assert sorted(path.name for path in partial.iterdir()) == [ANSWERS.format(0), ANSWERS.format(1)]
    monkeypatch.setattr(module, "_answer", lambda *all_: batches.append(all_[1].name) or answer(*all_))
    batches.clear()
    run_step("evaluate", CONFIG, tmp_path, inputs)
    assert len(batches) == 3 * len(ARMS), "warm-up and the two batches that were left"
    assert_same(one, tmp_path / "evaluate")


def answers_elsewhere(folder: Path) -> str:
    """A rank that sees other files of answers than its peer."""
    ranks = join_ranks()
    own = folder / str(ranks.state.process_index)
    answered = {str(ranks.state.process_index): {"vanilla": {"rollouts": [], "seconds": 0.0}}}
    (own / ANSWERS.format(0)).write_text(json.dumps(answered))
    module.decode({}, (), (), CONFIG, own)
    return ""


def test_processes_that_see_other_answers_stop(tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    with pytest.raises(UserError, match=r"do not see the same files .* shared storage"):
        run_processes(2, answers_elsewhere, tmp_path)
