"""Scores by benchmark: what stays apart, what is averaged, and that no row is lost without being counted."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from handmade import SECONDS, hand_made, recorded
from PIL import Image
from project import HASHES

from vismem.config import Config, JsonlSource, PrepareConfig, ValidateConfig
from vismem.data.prepare import prepare
from vismem.evaluation import report
from vismem.evaluation.benchmarks import HALLUSION, hallusion, task_names
from vismem.evaluation.evaluate import rows_set_apart
from vismem.evaluation.metrics import summarise
from vismem.evaluation.panels import Panel
from vismem.evaluation.predictions import Prediction
from vismem.records import Metrics
from vismem.validation.validate import validate


@pytest.fixture
def predictions() -> dict[str, list[Prediction]]:
    """The first five items are one benchmark's, the others another's; both have a task `chain`."""
    return {
        arm: [replace(answer, source="first" if place < 5 else "second") for place, answer in enumerate(answers)]
        for arm, answers in hand_made().items()
    }


def test_tasks_of_one_name_stay_apart_by_benchmark(predictions: dict[str, list[Prediction]]) -> None:
    metrics = Metrics(**summarise(predictions, SECONDS, seed=0, resamples=50), **HASHES)
    assert list(metrics.tasks) == ["count", "match", "first: chain", "second: chain", "exists"]
    assert [metrics.tasks[name].arms["vanilla"] for name in ("first: chain", "second: chain")] == [100.0, 0.0]
    assert metrics.invocation is not None
    assert set(metrics.invocation.tasks) == set(metrics.tasks)
    assert metrics.invocation.tasks["first: chain"].answers_with_memory == 100.0
    assert task_names(hand_made()["vanilla"]) == [answer.task for answer in hand_made()["vanilla"]]


def test_macro_weighs_benchmarks_alike_and_overall_weighs_questions_alike(
    predictions: dict[str, list[Prediction]],
) -> None:
    found = summarise(predictions, SECONDS, seed=0, resamples=50, set_apart={"second": 2, "third": 4})
    assert {name: (b["n"], b["set_apart"]) for name, b in found["benchmarks"].items()} == {
        "first": (5, 0),
        "second": (3, 2),
        "third": (0, 4),
    }
    assert found["benchmarks"]["first"]["arms"]["vanilla"] == pytest.approx(60.0)
    assert found["benchmarks"]["second"]["arms"]["vanilla"] == pytest.approx(100 / 3)
    assert found["macro"]["vanilla"] == pytest.approx((60 + 100 / 3) / 2)
    assert found["arms"]["vanilla"]["overall"] == 50.0
    assert found["benchmarks"]["third"]["arms"] == {}


def test_hallusion_bench_counts_answers_figures_and_questions(predictions: dict[str, list[Prediction]]) -> None:
    right = {
        "VD_math_1_0_1_0": 1,
        "VD_math_1_0_1_1": 1,
        "VD_math_1_0_2_0": 1,
        "VD_math_1_0_2_1": 0,
        "VS_map_1_0_1_0": 1,
    }
    ids = [f"{HALLUSION}-{name}" for name in right]
    answers = [
        replace(answer, id=name, source=HALLUSION, score=float(score))
        for answer, name, score in zip(predictions["vanilla"], ids, right.values(), strict=False)
    ]
    found = Metrics(**summarise({"vanilla": answers}, {"vanilla": 0.1}, seed=0, resamples=50), **HASHES)
    figures = found.benchmarks[HALLUSION].figures["vanilla"]
    assert figures == pytest.approx({"aAcc": 80.0, "fAcc": 200 / 3, "qAcc": 200 / 3, "mean": (80 + 400 / 3) / 3})
    assert found.benchmarks[HALLUSION].arms["vanilla"] == pytest.approx(80.0)
    assert hallusion(["HallusionBench-7"], np.array([100.0])) == {}


def test_rows_without_an_answer_are_set_apart_and_counted(tmp_path: Path) -> None:
    rows = []
    for number in range(20):
        file = io.BytesIO()
        Image.new("RGB", (40, 40), (number, 0, 0)).save(file, "PNG")
        (tmp_path / f"{number}.png").write_bytes(file.getvalue())
        row = {"id": str(number), "image": f"{number}.png", "prompt": "Which?", "answer": "" if number == 7 else "x"}
        rows.append(json.dumps(row))
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    source = JsonlSource(kind="jsonl", path=tmp_path / "own.jsonl", split="test")
    config = Config(prepare=PrepareConfig(sources=(source,)), validate=ValidateConfig(required_splits=("test",)))
    for step, inputs in ((prepare, {}), (validate, {"prepare": tmp_path / "prepare"})):
        (tmp_path / step.__name__).mkdir()
        step(config, inputs, tmp_path / step.__name__)
    assert rows_set_apart(tmp_path / "validate") == {"jsonl:own.jsonl": 1}
    assert rows_set_apart(tmp_path / "prepare") == {}


def test_one_benchmark_without_quarantine_needs_no_table_of_its_own() -> None:
    metrics = recorded(hand_made())
    assert list(metrics.benchmarks) == ["hand"]
    assert metrics.macro == {arm: pytest.approx(figures["overall"]) for arm, figures in metrics.arms.items()}


def test_the_report_shows_every_benchmark_with_what_was_set_apart(predictions: dict[str, list[Prediction]]) -> None:
    metrics = Metrics(**summarise(predictions, SECONDS, seed=0, resamples=50, set_apart={"second": 2}), **HASHES)
    charts: dict[str, list[Panel]] = {"scores": [], "tasks": []}
    page = report.render(metrics, predictions, charts, {}.get, {}, Config().evaluate)
    assert "<tr><td>second</td><td>3</td><td>2</td><td>33.3</td>" in page
    assert "<td>macro: the mean of the benchmarks</td><td></td><td></td><td>46.7</td>" in page
    assert 'data-task="first: chain"' in page
    assert '<option value="first: chain">' in page
