"""Metrics and answers from hand-made predictions, with figures worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from handmade import SECONDS, hand_made

from vismem.data.sample import Capability, Sample, write_shards
from vismem.errors import UserError
from vismem.evaluation.arms import ARMS, label, resolve_arms
from vismem.evaluation.evaluate import pick
from vismem.evaluation.metrics import summarise
from vismem.evaluation.plots import position_counts
from vismem.evaluation.predictions import (
    Prediction,
    predict,
    predictions_file,
    read_predictions,
    relative_positions,
    write_predictions,
)
from vismem.evaluation.statistics import holm, paired_difference, score_interval
from vismem.generation.invocation import Learned
from vismem.generation.types import LATENT, Invocation, Rollout
from vismem.models.kinds import MemoryKind

UNSEEN = 100 * 1.959964**2 / (2 + 1.959964**2)  # points that two items without a difference do not exclude
NOTHING = {"delta": 0.0, "ci95": pytest.approx([-UNSEEN, UNSEEN]), "p": 1.0, "p_holm": 1.0, "detectable": None}


@pytest.fixture
def predictions() -> dict[str, list[Prediction]]:
    return hand_made()


@pytest.fixture
def metrics(predictions: dict[str, list[Prediction]]) -> dict:
    return summarise(predictions, SECONDS, seed=7, resamples=500)


def test_scores_are_percent_of_items_by_capability_and_overall(metrics: dict) -> None:
    assert metrics["n"] == 8
    assert metrics["seed"] == 7
    assert metrics["arms"]["vanilla"] == {
        "overall": 50.0,
        "understanding": 50.0,
        "reasoning": 50.0,
        "generation": 50.0,
        "seconds_per_sample": 0.02,
        "visual_tokens": 5.5,
    }
    assert metrics["arms"]["vismem"] == {
        "overall": 75.0,
        "understanding": 100.0,
        "reasoning": 0.0,
        "generation": 100.0,
        "seconds_per_sample": 0.025,
        "visual_tokens": 5.5,
    }
    assert metrics["overhead"] == {"vismem": pytest.approx(0.25), "short_only": pytest.approx(0.0)}
    assert metrics["counts"] == {"understanding": 4, "reasoning": 2, "generation": 2}


def test_gains_are_paired_differences_with_the_exact_p(metrics: dict) -> None:
    overall = metrics["gain"]["overall"]
    assert overall["delta"] == 25.0
    assert overall["p"] == pytest.approx(2 * (1 + 4) / 2**4)  # three items gained, one lost
    assert overall["ci95"][0] <= 25.0 <= overall["ci95"][1]
    reasoning = {"delta": -50.0, "ci95": pytest.approx([-100.0, np.hypot(50, UNSEEN) - 50]), "p": 1.0, "p_holm": 1.0}
    assert metrics["gain"]["reasoning"] == {**reasoning, "detectable": pytest.approx(50 * (12.7062 + 1.376382))}
    assert set(metrics["ablations"]) == {"short_only"}
    assert metrics["ablations"]["short_only"]["overall"]["delta"] == 12.5
    assert metrics["ablations"]["short_only"]["reasoning"] == NOTHING


def test_differences_that_stand_side_by_side_have_holms_p_but_for_the_one_chosen_beforehand(
    predictions: dict[str, list[Prediction]],
) -> None:
    many = {arm: [replace(a, id=f"{a.id}.{n}") for n in range(6) for a in rows] for arm, rows in predictions.items()}
    metrics = summarise(many, SECONDS, seed=7, resamples=500)
    assert metrics["gain"]["overall"]["p_holm"] is None
    cells = [cell for rows in (metrics["gain"], *metrics["ablations"].values()) for cell in rows.values()][1:]
    assert len(cells) == 7
    assert [cell["p_holm"] for cell in cells] == holm([cell["p"] for cell in cells])
    smallest = min(cells, key=lambda cell: cell["p"])
    assert smallest["p_holm"] == pytest.approx(7 * smallest["p"])
    apart = metrics["yes_no"]["gain"]
    assert apart["overall"] == metrics["gain"]["overall"]
    assert [apart[name]["p_holm"] for name in ("without", "only")] == holm([apart["without"]["p"], apart["only"]["p"]])


def test_arms_are_compared_with_each_other_too_each_pair_once(predictions: dict[str, list[Prediction]]) -> None:
    predictions["long_only"] = [replace(answer, score=0.0) for answer in predictions["vanilla"]]
    clustered = {arm: [replace(a, cluster=a.task) for a in rows] for arm, rows in predictions.items()}
    pairs = summarise(clustered, SECONDS | {"long_only": 0.02}, seed=7, resamples=500)["pairs"]
    assert {arm: list(row) for arm, row in pairs.items()} == {
        "short_only": ["vismem"],
        "long_only": ["vismem", "short_only"],
    }
    scores = {arm: np.array([100 * a.score for a in rows]) for arm, rows in clustered.items()}
    clusters = np.array([a.task for a in clustered["vanilla"]])
    cells = [(arm, other) for arm, row in pairs.items() for other in row]
    expected = [paired_difference(scores[a], scores[b], clusters, seed=7, resamples=500) for a, b in cells]
    for (arm, other), found, p in zip(cells, expected, holm([each.p for each in expected]), strict=True):
        assert pairs[arm][other] == found.model_copy(update={"p_holm": p}).model_dump(mode="json")
    assert pairs["short_only"]["vismem"]["delta"] == -12.5


def test_every_arm_has_the_interval_of_each_of_its_scores(predictions: dict[str, list[Prediction]]) -> None:
    metrics = summarise(predictions, SECONDS, seed=7, resamples=500)
    score = 100 * np.array([answer.score for answer in predictions["vismem"]])
    groups = {"overall": slice(0, 8), "understanding": slice(0, 4), "reasoning": slice(4, 6), "generation": slice(6, 8)}
    expected = {name: list(score_interval(score[group], np.arange(8)[group])) for name, group in groups.items()}
    assert metrics["intervals"]["vismem"] == expected
    assert set(metrics["intervals"]) == set(predictions)


def test_without_the_arm_of_vismem_there_is_no_gain_and_no_use_of_memory(
    predictions: dict[str, list[Prediction]],
) -> None:
    del predictions["vismem"]
    metrics = summarise(predictions, SECONDS, seed=7, resamples=500)
    assert (metrics["gain"], metrics["yes_no"]["gain"], metrics["invocation"]) == ({}, {}, None)
    assert set(metrics["ablations"]) == {"short_only"}


def test_tasks_stand_in_the_order_of_the_capabilities(metrics: dict) -> None:
    assert list(metrics["tasks"]) == ["count", "match", "chain", "exists"]
    assert metrics["tasks"]["count"]["n"] == 3
    assert metrics["tasks"]["count"]["arms"]["vismem"] == 100.0
    assert metrics["tasks"]["count"]["arms"]["vanilla"] == pytest.approx(100 / 3)
    assert metrics["tasks"]["chain"]["capability"] == "reasoning"


def test_yes_no_questions_are_also_reported_apart(metrics: dict) -> None:
    assert metrics["yes_no"]["n"] == 2
    assert metrics["yes_no"]["arms"]["vanilla"] == {"overall": 50.0, "without": 50.0, "only": 50.0, "says_yes": 0.0}
    assert metrics["yes_no"]["arms"]["vismem"]["says_yes"] == 50.0
    assert metrics["yes_no"]["gain"]["only"]["delta"] == 50.0
    assert metrics["yes_no"]["gain"]["without"]["delta"] == pytest.approx(100 / 6)


def test_memory_use_is_counted_by_task_and_kind(metrics: dict) -> None:
    count = metrics["invocation"]["tasks"]["count"]
    assert count["answers_with_memory"] == 100.0
    assert count["short"] == {"per_answer": 1.0, "mean_position": pytest.approx(0.5 / 3)}
    assert count["long"] == {"per_answer": pytest.approx(1 / 3), "mean_position": 0.75}
    assert metrics["invocation"]["tasks"]["match"]["long"] == {"per_answer": 0.0, "mean_position": None}
    assert metrics["invocation"]["overall"]["answers_with_memory"] == 50.0
    assert metrics["invocation_by_arm"]["vanilla"]["short"]["per_answer"] == 0.0


def test_unparsed_and_unfinished_rates_are_percent_of_answers(metrics: dict) -> None:
    assert metrics["unparsed"] == {"vanilla": 37.5, "vismem": 25.0, "short_only": 37.5 - 12.5}
    assert metrics["unfinished"] == {"vanilla": 12.5, "vismem": 12.5, "short_only": 12.5}


def test_the_same_seed_gives_the_same_metrics(predictions: dict[str, list[Prediction]], metrics: dict) -> None:
    again = summarise(predictions, SECONDS, seed=7, resamples=500)
    assert json.dumps(again) == json.dumps(metrics)


def test_a_capability_without_items_is_left_out(predictions: dict[str, list[Prediction]]) -> None:
    some = {arm: answers[:6] for arm, answers in predictions.items()}
    metrics = summarise(some, SECONDS, seed=0, resamples=100)
    assert set(metrics["gain"]) == {"overall", "understanding", "reasoning"}
    assert "generation" not in metrics["arms"]["vismem"]
    assert metrics["yes_no"]["n"] == 0
    assert metrics["yes_no"]["arms"]["vismem"].keys() == {"overall", "without"}


def test_arms_on_different_items_are_an_error(predictions: dict[str, list[Prediction]]) -> None:
    predictions["vismem"] = predictions["vismem"][::-1]
    with pytest.raises(ValueError, match="other items"):
        summarise(predictions, SECONDS, seed=0, resamples=100)
    with pytest.raises(ValueError, match=r"^there are no predictions to summarise$"):
        summarise({"vanilla": []}, SECONDS, seed=0, resamples=100)


def test_predictions_come_back_from_parquet_as_they_were(
    tmp_path: Path, predictions: dict[str, list[Prediction]]
) -> None:
    write_predictions(predictions["vismem"], tmp_path / "vismem.parquet")
    assert read_predictions(tmp_path / "vismem.parquet") == predictions["vismem"]


def rollout(ids: tuple[int, ...], events: tuple[tuple[int, MemoryKind], ...], text: str = "") -> Rollout:
    return Rollout(
        sample_id="1",
        token_ids=ids,
        loss_mask=(True,) * len(ids),
        logprobs=(0.0,) * len(ids),
        invocations=tuple(Invocation(position, kind, False) for position, kind in events),
        text=text,
        marked_text=text,
        finished=True,
        answer_length=4,
    )


def test_relative_position_counts_text_tokens_only() -> None:
    invoke, end = 90, 91
    # at the start; after two of four tokens; and straight behind that memory
    ids = (invoke, LATENT, LATENT, end, 5, 6, invoke, LATENT, end, invoke, LATENT, end, 7, 8)
    found = rollout(ids, ((0, MemoryKind.SHORT), (6, MemoryKind.LONG), (9, MemoryKind.SHORT)))
    assert relative_positions(found) == [0.0, 0.5, 0.5]
    assert relative_positions(rollout((5, 6, invoke, LATENT, end), ((2, MemoryKind.SHORT),))) == [1.0]
    assert relative_positions(rollout((5, 6), ())) == []


def test_a_prediction_is_read_and_scored_from_its_own_rollout() -> None:
    sample = Sample("1", (), "How many?", "3", choices=("2", "3"), task="count")
    found = predict(sample, rollout((5, 6), (), "red at left. answer: 3"))
    assert (found.extracted, found.rule, found.score) == ("3", "answer stated", 1.0)
    assert predict(sample, rollout((5,), (), "2 or 3")).score == 0.0
    with pytest.raises(ValueError, match="paired"):
        predict(replace(sample, id="2"), rollout((5,), ()))


def test_positions_are_counted_in_tenths(predictions: dict[str, list[Prediction]]) -> None:
    assert position_counts(predictions["vismem"], MemoryKind.SHORT).tolist() == [1, 0, 2, 0, 0, 0, 0, 0, 0, 0]
    assert position_counts(predictions["vismem"], MemoryKind.LONG).tolist() == [0, 0, 0, 0, 0, 0, 0, 2, 0, 0]


def test_an_unknown_arm_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"unknown arm 'short_onli' .did you mean 'short_only'") as refused:
        resolve_arms(("vanilla", "short_onli"))
    assert all(name in str(refused.value) for name in ARMS)
    with pytest.raises(UserError, match="'vanilla' is missing"):
        resolve_arms(("vismem",))
    with pytest.raises(UserError, match="named twice"):
        resolve_arms(("vanilla", "vanilla"))


def test_an_arm_with_a_limit_is_the_same_policy_with_that_limit() -> None:
    vanilla, one, two = resolve_arms(("vanilla", "vismem@1", "random_50@12"))
    assert vanilla == ARMS["vanilla"]
    assert (one.name, one.label, one.policy) == ("vismem@1", "VisMem, at most 1", Learned(limit=1))
    assert (two.name, two.label) == ("random_50@12", "random 50 %, at most 12")
    assert two.policy == replace(ARMS["random_50"].policy, limit=12)
    assert "at most 12 per answer" in two.description
    assert label("vismem@1") == "VisMem, at most 1"
    assert label("gone@1") == "gone@1", "of an older file"
    assert predictions_file(Path("out"), "vismem@1").name == "vismem-at-most-1.parquet"
    names = [f"{arm}{limit}" for arm in ARMS for limit in ("", "@1", "@2")]
    assert len({predictions_file(Path("out"), name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vismen@2", "did you mean 'vismem@2'"),
        ("vismem@0", "from 1 on"),
        ("vismem@01", "from 1 on"),
        ("vismem@", "from 1 on"),
        ("vismem@1@2", "from 1 on"),
        ("no_memory@1", "'no_memory' has a limit of its own, 0"),
        ("start_short@2", "'start_short' has a limit of its own, 1"),
        ("sft_lora@1", "'sft_lora' has a limit of its own, 0"),
    ],
)
def test_a_limit_that_an_arm_cannot_have_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve_arms(("vanilla", name))


def test_only_arms_that_need_nothing_trained_are_the_bare_base() -> None:
    assert {name for name, arm in ARMS.items() if arm.policy.base} == {"vanilla", "relook", "full_resolution"}
    for name, arm in ARMS.items():
        assert arm.policy.base == arm.description.startswith("the base model"), name


def test_a_limit_draws_the_same_items_for_the_same_seed(tmp_path: Path) -> None:
    samples = [Sample(str(i), (), "?", "a", capability=Capability.REASONING) for i in range(20)]
    write_shards(samples, tmp_path, rows_per_shard=7)
    assert list(pick(tmp_path, None, 0)) == samples
    some = list(pick(tmp_path, 5, 3))
    assert [s.id for s in some] == sorted((s.id for s in some), key=int)
    assert len(some) == 5
    assert some == list(pick(tmp_path, 5, 3))
    assert some != samples[:5]
    assert list(pick(tmp_path, 99, 3)) == samples


def test_an_empty_or_missing_or_damaged_test_split_is_an_error_with_its_place(tmp_path: Path) -> None:
    write_shards([], tmp_path / "empty")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "part-00000.parquet").write_bytes(b"no parquet")
    for name in ("empty", "missing", "damaged"):
        with pytest.raises(UserError, match=name):
            pick(tmp_path / name, None, 0)
