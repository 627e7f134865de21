"""Headline, tables, charts and the report from hand-made predictions."""

import base64
import dataclasses
import errno
import hashlib
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from handmade import hand_made, recorded
from PIL import Image
from rich.console import Console

from vismem.config import Config
from vismem.evaluation import report
from vismem.evaluation.arms import ARMS
from vismem.evaluation.evaluate import write
from vismem.evaluation.panels import Panel, to_svg
from vismem.evaluation.plots import evaluation_charts, score_panels, training_panels
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.report import disagreements, examples, mark_memories
from vismem.evaluation.summary import headline, score_table
from vismem.records import Difference, Metrics

STEPS = pd.DataFrame({"step": range(4), "loss": [0.4, 0.3, 0.2, 0.1], "reward": 0.5, "kl": 0.0})
CURVES = {"warm_start": STEPS, "stage2": STEPS.assign(invocations_short=0.2, invocations_long=0.9)}


@pytest.fixture
def predictions() -> dict[str, list[Prediction]]:
    return hand_made()


@pytest.fixture
def metrics(predictions: dict[str, list[Prediction]]) -> Metrics:
    return recorded(predictions)


def with_gain(metrics: Metrics, **values: Any) -> Metrics:
    better = Difference(**{"delta": 5.0, "ci95": (2.0, 8.0), "p": 0.0004, **values})
    return metrics.model_copy(update={"gain": {**metrics.gain, "overall": better}})


def test_among_others_the_corrected_p_says_what_is_shown() -> None:
    for ends, said in (((1.0, 5.0), "better"), ((-5.0, -1.0), "worse")):
        alone, kept, lost = (Difference(delta=3.0, ci95=ends, p=0.01, p_holm=p) for p in (None, 0.04, 0.06))
        assert (alone.outcome, kept.outcome, lost.outcome) == (said, said, "not shown")


def png(colour: str, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def page_of(predictions: dict[str, list[Prediction]], pictures: dict[str, list[bytes]] | None = None) -> str:
    charts: dict[str, list[Panel]] = {"scores": [], "tasks": []}
    return report.render(recorded(predictions), predictions, charts, (pictures or {}).get, {}, Config().evaluate)


class Elements(HTMLParser):
    """The elements of a page: tag and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


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
    assert f"{metrics.gain['understanding'].p:.3f}" not in text, "p of the capabilities is Holm's"


def test_answers_that_were_kept_stay_until_all_is_written(
    tmp_path: Path, predictions: dict[str, list[Prediction]], metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "answers-0.checkpoint"
    kept.write_text("{}")
    charts = evaluation_charts(metrics, predictions, CURVES)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", full)
        with pytest.raises(OSError, match="No space"):
            write(Config(), tmp_path, predictions, metrics, charts, {}.get, {})
    assert kept.is_file()
    write(Config(), tmp_path, predictions, metrics, charts, {}.get, {})
    assert not kept.exists()


def test_the_step_writes_a_page_that_needs_no_network(
    tmp_path: Path, predictions: dict[str, list[Prediction]], metrics: Metrics
) -> None:
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "leftover.parquet").write_bytes(b"")
    pictures = {"item-1": [b"\x89PNG", png("red")]}
    charts = evaluation_charts(metrics, predictions, CURVES)
    write(Config(), tmp_path, predictions, metrics, charts, pictures.get, {"base model": "hand"})
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert not re.search(r"url\((?!data:|#)", page)
    assert "&lt;b&gt;?" in page
    assert '<span class="chip short">short-term memory</span>' in page
    assert "does not decode" in page
    assert "\N{MINUS SIGN}50.0" in page, "a loss has a true minus"
    assert headline(metrics) in page
    assert page.count("<svg") == sum(map(len, charts.values())) == 4 + 3 + 1 + 2 + 3
    assert Metrics.read(tmp_path) == metrics
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "metrics.json",
        "scores.json",
        "report.html",
        *(f"predictions/{arm}.parquet" for arm in predictions),
        *(f"plots/{name}.png" for name in charts),
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
    charts = {name: panels[:1] for name, panels in evaluation_charts(metrics, predictions, {}).items()}
    write(Config(), tmp_path, predictions, metrics, charts, {}.get, {})
    assert "Vanilla answers 50.0 %" in (tmp_path / "report.html").read_text()


def test_every_question_is_in_the_page_as_each_arm_answered_it_with_what_the_filters_read(
    predictions: dict[str, list[Prediction]],
) -> None:
    page = page_of(predictions)
    cards = [attributes for tag, attributes in Elements(page).found if tag == "article"][-8:]
    assert [card["data-task"] for card in cards] == [answer.task for answer in predictions["vanilla"]]
    unread = {arm: [answer.rule == "unparsed" for answer in rows] for arm, rows in predictions.items()}
    rights = [
        "".join("u" if unread[arm][place] else str(int(rows[place].score)) for arm, rows in predictions.items())
        for place in range(8)
    ]
    assert {*"".join(rights)} == {"0", "1", "u"}
    assert [card["data-right"] for card in cards] == rights
    assert [card["data-memory"] for card in cards] == ["nsn", "nbn", "nsn", "nnn", "nln", *["nnn"] * 3]
    reordered = dict(reversed(predictions.items()))
    form = next(attributes for tag, attributes in Elements(page_of(reordered)).found if tag == "form")
    assert form["data-reference"] == "2"
    assert "hidden" in form, "without JavaScript there are no filters, and all cards are shown"


def test_a_hostile_question_runs_nothing(predictions: dict[str, list[Prediction]]) -> None:
    hostile = "$\\frac$</script></style><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    for arm, answers in predictions.items():
        texts = dict.fromkeys(("task", "question", "reference", "text", "marked_text", "extracted"), hostile)
        predictions[arm] = [dataclasses.replace(answers[0], **texts), *answers[1:]]
    metrics = recorded(predictions)
    provenance = {hostile: hostile}
    charts = evaluation_charts(metrics, predictions, CURVES)
    page = report.render(metrics, predictions, charts, {}.get, provenance, Config().evaluate)
    elements = Elements(page).found
    assert [attributes for tag, attributes in elements if tag == "script"] == [{}]
    assert not [
        tag for tag, attributes in elements if tag == "img" or any(name.startswith("on") for name in attributes)
    ]
    policy = next(str(attributes["content"]) for tag, attributes in elements if "http-equiv" in attributes)
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_a_picture_is_in_the_page_once_and_a_large_one_as_a_thumbnail(
    predictions: dict[str, list[Prediction]],
) -> None:
    small, large = png("red"), png("blue", 600)
    page = page_of(predictions, {f"item-{place}": [small, large] for place in range(8)})
    addresses = re.findall(r"url\(data:image/(\w+);base64,([^)]+)\)", page)
    assert [kind for kind, _ in addresses] == ["png", "webp"]
    assert base64.b64decode(addresses[0][1]) == small
    with Image.open(io.BytesIO(base64.b64decode(addresses[1][1]))) as image:
        assert image.size == (168, 168)


def test_a_page_of_too_many_answers_shows_some_and_says_so(
    predictions: dict[str, list[Prediction]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = page_of(predictions)
    assert "of the 8 questions, drawn at random" not in whole
    monkeypatch.setattr(report, "LARGEST", 3_000)
    part = page_of(predictions)
    shown = part.count("<article") - (whole.count("<article") - 8)
    assert 0 < shown < 8
    assert f"{shown} of the 8 questions, drawn at random" in part


def test_a_chart_is_the_same_text_every_time_and_has_no_colour_of_its_own(
    predictions: dict[str, list[Prediction]], metrics: Metrics
) -> None:
    """Its colours are the page's, so that it follows the page into the dark."""
    for panels in evaluation_charts(metrics, predictions, CURVES).values():
        text = to_svg(panels[-1])
        assert to_svg(panels[-1]) == text
        assert re.findall(r"#[0-9a-f]{6}\b", text) == []
    pictures = {"item-1": [png("red")]}
    assert page_of(predictions, pictures) == page_of(predictions, pictures)


def test_every_arm_has_a_row_of_its_own_in_the_chart_of_scores(predictions: dict[str, list[Prediction]]) -> None:
    def height(arms: list[str]) -> float:
        return score_panels(recorded({arm: predictions["vanilla"] for arm in arms}, resamples=10))[0].height

    two, twelve, all_arms = height(["vanilla", "vismem"]), height(list(ARMS)[:12]), height(list(ARMS))
    assert (twelve - two) / 10 == pytest.approx((all_arms - twelve) / (len(ARMS) - 12))
    assert twelve > two


def test_training_is_drawn_as_far_as_it_was_recorded() -> None:
    titles = [panel.title for panel in training_panels(CURVES)]
    assert titles == ["warm start: loss", "stage II: reward", "stage II: memories per answer"]
    assert training_panels({}) == []
    assert training_panels({"stage2": CURVES["stage2"][:0]}) == []


def test_as_many_losses_as_wins_are_shown(predictions: dict[str, list[Prediction]]) -> None:
    assert disagreements(predictions) == ([1, 2, 6], [4])
    wins, losses = examples([1, 2, 6], [4], seed=0)
    assert (len(wins), losses) == (1, [4])
    assert examples([1, 2, 6, 7], [], seed=0)[1] == []
    assert len(examples(range(9), range(9, 30), seed=0)[1]) == 4


def test_memories_are_marked_and_everything_else_escaped() -> None:
    marked = mark_memories("a,<m_I^l> <i>b")
    assert marked == 'a, <span class="chip long">long-term memory</span> &lt;i&gt;b'
