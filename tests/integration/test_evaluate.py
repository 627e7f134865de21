"""The step `evaluate` on a tiny random model: all files, the same metrics from the same seed, arms that differ."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from vismem.config import Config, EvaluateConfig
from vismem.data.sample import Sample, write_shards
from vismem.errors import UserError
from vismem.evaluation import decoding as module
from vismem.evaluation.arms import ARMS
from vismem.evaluation.decoding import decode
from vismem.evaluation.evaluate import evaluate
from vismem.evaluation.predictions import predictions_file, read_predictions
from vismem.generation import batches
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Off
from vismem.generation.types import Rollout
from vismem.models.backbones.base import Backbone
from vismem.models.vismem import VisMemModel
from vismem.records import VANILLA, VISMEM

OWN = (*(name for name, arm in ARMS.items() if arm.model == VISMEM), "vismem@1")  # the arms of the trained model
EAGER = 5.0  # offset of the invoke tokens' scores: the random model then invokes now and then
CONFIG = Config(
    seed=3,
    evaluate=EvaluateConfig(arms=OWN, limit=9, batch_size=4, max_new_tokens=10, bootstrap=100),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("artifacts")
    model = tiny.vismem(tiny_base)
    with torch.no_grad():
        model.tokens.bias += EAGER
    model.save_pretrained(root / "stage2")
    named = (replace(sample, cluster=str(place // 4)) for place, sample in enumerate(tiny.samples()))
    write_shards(named, root / "validate" / "data" / "test")
    return {"base": tiny_base, "stage2": root / "stage2", "validate": root / "validate"}


@pytest.fixture(scope="module")
def result(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate")
    assert "9 test questions" in evaluate(CONFIG, inputs, out)
    return out


def test_every_arm_answers_the_same_questions(result: Path) -> None:
    answers = {arm: read_predictions(predictions_file(result, arm)) for arm in OWN}
    ids = [answer.id for answer in answers[VANILLA]]
    assert len(ids) == 9
    assert all([answer.id for answer in rows] == ids for rows in answers.values())
    kinds = {arm: {e.kind for answer in rows for e in answer.invocations} for arm, rows in answers.items()}
    assert kinds[VANILLA] == set()
    assert kinds["short_only"] <= {"short"}
    assert kinds["long_only"] <= {"long"}
    assert kinds["random_100"] == {"short", "long"}
    assert kinds["no_memory"] == set()
    for kind in ("short", "long"):
        assert kinds[f"as_{kind}"] <= {kind}
        assert kinds[f"forced_{kind}"] == kinds[f"start_{kind}"] == {kind}
    assert kinds[VISMEM]
    forced = {arm: {e.forced for answer in rows for e in answer.invocations} for arm, rows in answers.items()}
    assert forced["random_100"] == {True}
    assert forced[VISMEM] == {False}
    for rows in answers.values():
        for answer in rows:
            assert all(0 <= event.relative_position <= 1 for event in answer.invocations)
            assert ("<m_I^" in answer.marked_text) == bool(answer.invocations)


def test_the_group_of_a_question_travels_from_the_shards_to_the_figures_and_the_page(result: Path) -> None:
    answers = read_predictions(predictions_file(result, VISMEM))
    places = {sample.id: place for place, sample in enumerate(tiny.samples())}
    groups = [places[answer.id] // 4 for answer in answers]
    assert 1 < len(set(groups)) < len(answers)
    pairs = {(group, answer.cluster) for group, answer in zip(groups, answers, strict=True)}
    assert len(pairs) == len(set(groups)) == len({answer.cluster for answer in answers})
    metrics = json.loads((result / "metrics.json").read_text())
    assert metrics["clusters"]["overall"] == len(pairs)
    assert f"n = 9, {len(pairs)} clusters" in (result / "report.html").read_text()


def test_the_metrics_hold_what_the_gate_and_the_report_read(result: Path) -> None:
    metrics = json.loads((result / "metrics.json").read_text())
    assert (metrics["n"], metrics["seed"], list(metrics["arms"])) == (9, 3, list(OWN))
    assert all(figures["seconds_per_sample"] > 0 for figures in metrics["arms"].values())
    ids = [answer.id for answer in read_predictions(predictions_file(result, VANILLA))]
    assert metrics["items_sha256"] == hashlib.sha256("\n".join(ids).encode()).hexdigest()
    assert set(metrics["gain"]["overall"]) == {"delta", "ci95", "p", "p_holm", "detectable"}
    assert (result / "report.html").stat().st_size > 10_000


def test_the_same_seed_gives_the_same_metrics_but_for_seconds(
    result: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    evaluate(CONFIG, inputs, tmp_path)
    first, again = (_without_seconds(folder / "metrics.json") for folder in (result, tmp_path))
    assert first == again
    assert read_predictions(result / "predictions" / "random_50.parquet") == read_predictions(
        tmp_path / "predictions" / "random_50.parquet"
    )


def test_a_killed_evaluation_goes_on_behind_its_answers_and_ends_like_an_unbroken_one(
    result: Path, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[int] = []

    def answer(model: VisMemModel, samples: Sequence[Sample], *given: Any, **settings: Any) -> list[Rollout]:
        answered.append(len(samples))
        return generate(model, samples, *given, **settings)

    def answer_until_killed(*given: Any, **settings: Any) -> list[Rollout]:
        if len(answered) == 3 * len(OWN) - 1:  # warm-up, a round of three, and the next but for its last arm
            raise KeyboardInterrupt
        return answer(*given, **settings)

    monkeypatch.setattr(batches, "generate", answer_until_killed)
    monkeypatch.setattr(module, "KEEP_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(CONFIG, inputs, tmp_path)
    answered.clear()
    monkeypatch.setattr(batches, "generate", answer)
    evaluate(CONFIG, inputs, tmp_path)
    assert len(answered) == 3 * len(OWN), "warm-up and two rounds of three"
    assert _without_seconds(tmp_path / "metrics.json") == _without_seconds(result / "metrics.json")
    for arm in OWN:
        again, unbroken = (read_predictions(predictions_file(folder, arm)) for folder in (tmp_path, result))
        assert again == unbroken
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in result.iterdir())


@pytest.mark.parametrize(("fit", "warm_up", "parts", "failed"), [(8, 1, 1, []), (2, 4, 2, [8, 4])])
def test_an_arm_s_seconds_are_those_of_its_own_decoding_and_the_arms_take_turns(
    monkeypatch: pytest.MonkeyPatch, fit: int, warm_up: int, parts: int, failed: list[int]
) -> None:
    """Of what does not fit on the GPU too, which is tried once for all arms and batches."""
    clock, order, lost = [0.0], list[str](), list[int]()
    names = {ARMS[name].policy: name for name in (VANILLA, VISMEM)}

    def answer(_: object, samples: Sequence[Sample], policy: InvocationPolicy, **__: object) -> list[Any]:
        clock[0] += len(samples) * (1.0 if names[policy] == VANILLA else 3.0)
        if len(samples) > fit:
            lost.append(len(samples))
            raise torch.OutOfMemoryError
        order.append(names[policy])
        return [None] * len(samples)

    monkeypatch.setattr(batches, "generate", answer)
    monkeypatch.setattr(batches, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    models: Any = {VISMEM: SimpleNamespace(backbone=Backbone)}
    runs = decode(models, [ARMS[VANILLA], ARMS[VISMEM]], tiny.samples()[:9], CONFIG)
    assert {name: run.seconds for name, run in runs.items()} == {VANILLA: 9.0, VISMEM: 27.0}
    turns = [name for name in (VANILLA, VISMEM, VISMEM, VANILLA, VANILLA, VISMEM) for _ in range(parts)]
    assert order[2 * warm_up :] == turns, "behind the warm-up"
    assert lost == failed


def test_batches_do_not_change_an_answer(inputs: dict[str, Path]) -> None:
    model = VisMemModel.from_pretrained(inputs["stage2"], inputs["base"])
    arms = [ARMS[VANILLA], ARMS[VISMEM], ARMS["random_50"]]
    samples = tiny.samples()[:5]
    alone = CONFIG.model_copy(update={"evaluate": CONFIG.evaluate.model_copy(update={"batch_size": 1})})
    many, one = (decode({VISMEM: model}, arms, samples, config) for config in (CONFIG, alone))
    for arm in arms:
        assert [r.token_ids for r in many[arm.name].rollouts] == [r.token_ids for r in one[arm.name].rollouts]


@pytest.mark.parametrize("fit", [2, 0])
def test_a_batch_that_does_not_fit_on_the_gpu_is_answered_in_halves(
    inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fit: int
) -> None:
    model = VisMemModel.from_pretrained(inputs["stage2"], inputs["base"])
    samples, arm = tiny.samples()[:5], ARMS[VISMEM]
    wanted = _texts(decode({VISMEM: model}, [arm], samples, CONFIG)[VISMEM].rollouts)

    def small(model: VisMemModel, batch: Sequence[Sample], *given: Any, **settings: Any) -> list[Rollout]:
        if len(batch) > fit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return generate(model, batch, *given, **settings)

    monkeypatch.setattr(batches, "generate", small)
    if not fit:
        with pytest.raises(UserError, match=f"too small to answer {samples[0].id}: CUDA out of memory"):
            decode({VISMEM: model}, [arm], samples, CONFIG)
        return
    assert _texts(decode({VISMEM: model}, [arm], samples, CONFIG)[VISMEM].rollouts) == wanted
    assert "5 questions together do not fit on the GPU: from now on 3 at most" in caplog.text


def test_vanilla_is_the_base_even_where_the_policy_has_an_adapter(inputs: dict[str, Path]) -> None:
    samples = tiny.samples()[:3]
    plain = VisMemModel.from_pretrained(inputs["stage2"], inputs["base"])
    adapted = VisMemModel.from_pretrained(inputs["stage2"], inputs["base"])
    adapted.policy_lora.enabled = True
    with torch.no_grad():
        for name, parameter in adapted.policy_lora.named_parameters():
            if "up." in name:
                parameter.normal_(std=0.5)
    wanted = _texts(generate(plain, samples, Off(), max_new_tokens=10))
    assert _texts(generate(adapted, samples, Off(), max_new_tokens=10)) != wanted
    assert _texts(decode({VISMEM: adapted}, [ARMS[VANILLA]], samples, CONFIG)[VANILLA].rollouts) == wanted
    assert adapted.policy_lora.enabled
    off = decode({VISMEM: adapted}, [ARMS["no_memory"]], samples, CONFIG)["no_memory"].rollouts
    assert _texts(off) == _texts(generate(adapted, samples, Off(), max_new_tokens=10)), "its adapter is on"


def test_a_fault_leaves_no_output(inputs: dict[str, Path], tmp_path: Path) -> None:
    no_rows = tmp_path / "validate"
    write_shards(list[Sample](), no_rows / "data" / "test")
    with pytest.raises(UserError, match="no rows"):
        evaluate(CONFIG, {**inputs, "validate": no_rows}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _texts(rollouts: list) -> list[str]:
    return [rollout.text for rollout in rollouts]


def _without_seconds(path: Path) -> dict:
    metrics = json.loads(path.read_text())
    del metrics["overhead"]
    for figures in metrics["arms"].values():
        del figures["seconds_per_sample"]
    return metrics
