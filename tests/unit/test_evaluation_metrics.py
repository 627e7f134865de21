"""Metrics, tables and the report from hand-made predictions, with figures worked out by hand."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from vismem.config import Config
from vismem.data.sample import Capability, Sample, write_shards
from vismem.errors import UserError
from vismem.evaluation.arms import ARMS, resolve_arms
from vismem.evaluation.evaluate import pick, write
from vismem.evaluation.metrics import summarise
from vismem.evaluation.plots import position_counts, score_plot
from vismem.evaluation.predictions import (
    InvocationRecord,
    Prediction,
    predict,
    read_predictions,
    relative_positions,
    write_predictions,
)
from vismem.evaluation.report import disagreements, examples, mark_memories
from vismem.evaluation.summary import headline, score_table
from vismem.generation.types import LATENT, Invocation, Rollout
from vismem.models.kinds import MemoryKind

SECONDS = {"vanilla": 0.02, "vismem": 0.025, "short_only": 0.02}
# item: task, capability, reference, vanilla right, vismem right, short_only right
ITEMS = [
    ("count", "understanding", "2", 1, 1, 1),
    ("count", "understanding", "3", 0, 1, 1),
    ("count", "understanding", "4", 0, 1, 0),
    ("match", "understanding", "red", 1, 1, 1),
    ("chain", "reasoning", "blue", 1, 0, 1),
    ("chain", "reasoning", "blue", 0, 0, 0),
    ("exists", "generation", "yes", 0, 1, 0),
    ("exists", "generation", "No", 1, 1, 1),
]


def prediction(place: int, right: int, invocations: tuple[InvocationRecord, ...] = ()) -> Prediction:
    task, capability, reference, *_ = ITEMS[place]
    wrong = {"yes": "no", "No": "yes"}.get(reference)
    extracted = reference if right else wrong
    return Prediction(
        id=f"item-{place}",
        task=task,
        capability=capability,
        source="hand",
        question=f"question {place} <b>?",
        reference=reference,
        text=f"answer: {extracted}",
        marked_text=f"seen,<m_I^s> answer: {extracted} <script>" if invocations else f"answer: {extracted}",
        extracted=extracted,
        rule="answer stated" if extracted else "unparsed",
        score=float(right),
        invocations=invocations,
        answer_length=4,
        finished=place != 5,
    )


@pytest.fixture
def predictions() -> dict[str, list[Prediction]]:
    short, long = InvocationRecord(2, "short", False, 0.25), InvocationRecord(9, "long", False, 0.75)
    used = {0: (short,), 1: (short, long), 2: (InvocationRecord(0, "short", False, 0.0),), 4: (long,)}
    return {
        "vanilla": [prediction(place, item[3]) for place, item in enumerate(ITEMS)],
        "vismem": [prediction(place, item[4], used.get(place, ())) for place, item in enumerate(ITEMS)],
        "short_only": [prediction(place, item[5]) for place, item in enumerate(ITEMS)],
    }


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
    }
    assert metrics["arms"]["vismem"] == {
        "overall": 75.0,
        "understanding": 100.0,
        "reasoning": 0.0,
        "generation": 100.0,
        "seconds_per_sample": 0.025,
    }
    assert metrics["overhead"] == {"vismem": pytest.approx(0.25), "short_only": pytest.approx(0.0)}
    assert metrics["counts"] == {"understanding": 4, "reasoning": 2, "generation": 2}


def test_gains_are_paired_differences_with_the_exact_p(metrics: dict) -> None:
    overall = metrics["gain"]["overall"]
    assert overall["delta"] == 25.0
    assert overall["p"] == pytest.approx(2 * (1 + 4) / 2**4)  # three items gained, one lost
    assert overall["ci95"][0] <= 25.0 <= overall["ci95"][1]
    assert metrics["gain"]["reasoning"] == {"delta": -50.0, "ci95": [-100.0, 0.0], "p": 1.0}
    assert set(metrics["ablations"]) == {"short_only"}
    assert metrics["ablations"]["short_only"]["overall"]["delta"] == 12.5
    assert metrics["ablations"]["short_only"]["reasoning"] == {"delta": 0.0, "ci95": [0.0, 0.0], "p": 1.0}


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


def test_arms_on_different_items_are_an_error(predictions: dict[str, list[Prediction]]) -> None:
    predictions["vismem"] = predictions["vismem"][::-1]
    with pytest.raises(ValueError, match="other items"):
        summarise(predictions, SECONDS, seed=0, resamples=100)


def test_the_headline_claims_no_more_than_the_interval(metrics: dict) -> None:
    assert headline(metrics).startswith("No difference can be shown.")
    better = {"delta": 5.0, "ci95": [2.0, 8.0], "p": 0.0004}
    metrics["gain"]["overall"] = better
    assert headline(metrics).startswith("VisMem is better on these questions.")
    assert "+5.0 points (95 % interval +2.0 to +8.0, p < 0.001)" in headline(metrics)
    metrics["gain"]["overall"] = {"delta": -5.0, "ci95": [-8.0, -2.0], "p": 0.001}
    assert headline(metrics).startswith("VisMem is worse")
    metrics["gain"]["overall"] = better | {"p": 0.06}
    assert headline(metrics).startswith("No difference")


def test_the_table_for_the_terminal_shows_every_capability(metrics: dict) -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(score_table(metrics))
    text = console.export_text()
    for wanted in ("understanding", "reasoning", "generation", "overall", "75.0", "+25.0", "0.625", "+25%"):
        assert wanted in text


def test_the_step_writes_a_page_that_needs_no_network(
    tmp_path: Path, predictions: dict[str, list[Prediction]], metrics: dict
) -> None:
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "leftover.parquet").write_bytes(b"")
    write(Config(), tmp_path, predictions, metrics, {"item-1": [b"\x89PNG"]}, {"base model": "hand"})
    page = (tmp_path / "report.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    assert "&lt;b&gt;?" in page
    assert '<span class="chip short">short-term memory</span>' in page
    assert 'alt=""' not in page
    assert "\N{MINUS SIGN}50.0" in page, "a loss has a true minus"
    assert page.count("data:image/png;base64,") >= 3
    assert headline(metrics) in page
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "metrics.json",
        "scores.json",
        "report.html",
        *(f"predictions/{arm}.parquet" for arm in predictions),
        *(f"plots/{name}" for name in ("scores.png", "tasks.png", "invocation.png")),
        *(f"plots/{name}" for name in ("scores.csv", "invocation_position.csv")),
    }
    scores = (tmp_path / "plots" / "scores.csv").read_text().splitlines()
    assert scores[0] == "capability,arm,score,low,high"
    assert scores[1].startswith("overall,vanilla,50.0,")
    assert len(scores) == 1 + 4 * 3


def test_a_report_needs_no_vismem_arm(tmp_path: Path, predictions: dict[str, list[Prediction]]) -> None:
    del predictions["vismem"]
    metrics = summarise(predictions, SECONDS, seed=0, resamples=100)
    assert metrics["gain"] == {}
    write(Config(), tmp_path, predictions, metrics, {}, {})
    assert "Vanilla answers 50.0 %" in (tmp_path / "report.html").read_text()


def test_every_arm_has_a_row_of_its_own_in_the_plot_of_scores(predictions: dict[str, list[Prediction]]) -> None:
    def height(arms: list[str]) -> int:
        answers = {arm: predictions["vanilla"] for arm in arms}
        metrics = summarise(answers, dict.fromkeys(arms, 0.02), seed=0, resamples=10)
        with Image.open(io.BytesIO(score_plot(metrics))) as image:
            return image.height

    two, twelve, all_arms = height(["vanilla", "vismem"]), height(list(ARMS)[:12]), height(list(ARMS))
    assert (twelve - two) / 10 == pytest.approx((all_arms - twelve) / (len(ARMS) - 12), abs=1)
    assert twelve > two


def test_as_many_losses_as_wins_are_shown(predictions: dict[str, list[Prediction]]) -> None:
    assert disagreements(predictions) == ([1, 2, 6], [4])
    wins, losses = examples([1, 2, 6], [4], seed=0)
    assert (len(wins), losses) == (1, [4])
    assert examples([1, 2, 6, 7], [], seed=0)[1] == []
    assert len(examples(range(9), range(9, 30), seed=0)[1]) == 4


def test_memories_are_marked_and_everything_else_escaped() -> None:
    marked = mark_memories("a,<m_I^l> <i>b")
    assert marked == 'a, <span class="chip long">long-term memory</span> &lt;i&gt;b'


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


def test_a_limit_draws_the_same_items_for_the_same_seed(tmp_path: Path) -> None:
    samples = [Sample(str(i), (), "?", "a", capability=Capability.REASONING) for i in range(20)]
    write_shards(samples, tmp_path, rows_per_shard=7)
    assert pick(tmp_path, None, 0) == samples
    some = pick(tmp_path, 5, 3)
    assert [s.id for s in some] == sorted((s.id for s in some), key=int)
    assert len(some) == 5
    assert some == pick(tmp_path, 5, 3)
    assert some != samples[:5]
    assert pick(tmp_path, 99, 3) == samples


def test_an_empty_or_missing_or_damaged_test_split_is_an_error_with_its_place(tmp_path: Path) -> None:
    write_shards([], tmp_path / "empty")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "part-00000.parquet").write_bytes(b"no parquet")
    for name in ("empty", "missing", "damaged"):
        with pytest.raises(UserError, match=name):
            pick(tmp_path / name, None, 0)
