"""Headline, tables, plots and the report from hand-made predictions."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from handmade import hand_made, recorded
from PIL import Image
from rich.console import Console

from vismem.config import Config
from vismem.evaluation.arms import ARMS
from vismem.evaluation.evaluate import write
from vismem.evaluation.plots import score_plot
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.report import disagreements, examples, mark_memories
from vismem.evaluation.summary import headline, score_table
from vismem.records import Difference, Metrics


@pytest.fixture
def predictions() -> dict[str, list[Prediction]]:
    return hand_made()


@pytest.fixture
def metrics(predictions: dict[str, list[Prediction]]) -> Metrics:
    return recorded(predictions)


def with_gain(metrics: Metrics, **values: Any) -> Metrics:
    better = Difference(**{"delta": 5.0, "ci95": (2.0, 8.0), "p": 0.0004, **values})
    return metrics.model_copy(update={"gain": {**metrics.gain, "overall": better}})


def test_the_headline_claims_no_more_than_the_interval_and_the_test(metrics: Metrics) -> None:
    assert headline(metrics).startswith("No difference can be shown.")
    assert headline(with_gain(metrics)).startswith("VisMem is better on these questions.")
    assert "+5.0 points (95 % interval +2.0 to +8.0, p < 0.001)" in headline(with_gain(metrics))
    assert headline(with_gain(metrics, delta=-5.0, ci95=(-8.0, -2.0), p=0.001)).startswith("VisMem is worse")
    for nothing in ({"p": 0.06}, {"ci95": (0.0, 8.0)}, {"delta": -5.0, "ci95": (-8.0, 0.0)}, {"p": math.nan}):
        assert headline(with_gain(metrics, **nothing)).startswith("No difference"), nothing


def test_the_table_for_the_terminal_shows_every_capability(metrics: Metrics) -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(score_table(metrics))
    text = console.export_text()
    for wanted in ("understanding", "reasoning", "generation", "overall", "75.0", "+25.0", "0.625", "+25%"):
        assert wanted in text


def test_the_step_writes_a_page_that_needs_no_network(
    tmp_path: Path, predictions: dict[str, list[Prediction]], metrics: Metrics
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
    assert Metrics.read(tmp_path) == metrics
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
    metrics = recorded(predictions)
    assert (metrics.gain, metrics.invocation) == ({}, None)
    write(Config(), tmp_path, predictions, metrics, {}, {})
    assert "Vanilla answers 50.0 %" in (tmp_path / "report.html").read_text()


def test_every_arm_has_a_row_of_its_own_in_the_plot_of_scores(predictions: dict[str, list[Prediction]]) -> None:
    def height(arms: list[str]) -> int:
        answers = {arm: predictions["vanilla"] for arm in arms}
        with Image.open(io.BytesIO(score_plot(recorded(answers, resamples=10)))) as image:
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
