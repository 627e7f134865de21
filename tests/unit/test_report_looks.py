"""The report's charts and memories say what they are; strange text and many questions do not break it."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from handmade import hand_made, recorded
from PIL import Image

from vismem.config import Config
from vismem.evaluation import report
from vismem.evaluation.looks import map_picture
from vismem.evaluation.panels import to_svg
from vismem.evaluation.plots import evaluation_charts, in_words, time_panel
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.report import mark_memories, to_look_at
from vismem.models.attention import Look
from vismem.models.kinds import MemoryKind

SHORT, LONG = MemoryKind
GRID = ((0.1, 0.0, 0.2), (0.05, 0.3, 0.0))
HOSTILE = {
    "markup": "</article></script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>",
    "long": "w" * 3000,
    "right to left": "\u202eكم عدد الكلاب؟ <b>",
    "half a character": "half \ud83d of one",
}


class Tips(HTMLParser):
    """What the points of a page say."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attrs if name == "data-tip"]


@pytest.fixture
def predictions() -> dict[str, list[Prediction]]:
    return hand_made()


def page_of(predictions: dict[str, list[Prediction]], looks: dict[int, list[Look]] | None = None) -> str:
    metrics = recorded(predictions, resamples=20)
    return report.render(
        metrics, predictions, evaluation_charts(metrics, predictions, {}), {}.get, {}, Config().evaluate, looks or {}
    )


def decoded(address: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGBA")).astype(int)


@pytest.mark.parametrize(("kind", "colour"), [(SHORT, (0, 114, 178)), (LONG, (213, 94, 0))])
def test_a_map_is_darkest_where_the_memory_looked_most_and_white_where_it_did_not(
    kind: MemoryKind, colour: tuple[int, int, int]
) -> None:
    seen = decoded(map_picture(GRID, kind))
    assert seen.shape == (2, 3, 4)
    order = np.argsort(np.ravel(GRID))
    assert (np.diff(seen[..., 3].ravel()[order]) >= 0).all()
    assert np.ravel(seen[..., 3]).argmax() == np.argmax(GRID)
    assert seen[0, 1].tolist() == [255, 255, 255, round(0.55 * 255)], "no attention: the veil alone"
    alpha = 0.85 + 0.55 * 0.15  # the colour over the veil
    assert seen[1, 1] == pytest.approx([*((0.85 * c + 0.55 * 0.15 * 255) / alpha for c in colour), 255 * alpha], abs=1)
    assert (decoded(map_picture(((0.0, 0.0),), kind))[..., 3] == round(0.55 * 255)).all()


def test_each_memory_has_its_own_look_and_an_answer_with_other_memories_none() -> None:
    text = "red,<m_I^l> <i>b<m_I^s>"
    marked = mark_memories(text, [Look(0.25, (GRID,)), Look(1.0, (GRID, None))])
    chips = re.findall(r'<button type="button" class="chip (\w+)" data-tip="(\d+) %[^"]*" data-maps="([^"]*)">', marked)
    assert [(kind, share) for kind, share, _ in chips] == [("long", "25"), ("short", "100")]
    assert chips[0][2] == f"url({map_picture(GRID, LONG)})"
    assert chips[1][2] == f"url({map_picture(GRID, SHORT)}) none"
    assert "&lt;i&gt;b" in marked
    assert mark_memories(text, [Look(0.25, (GRID,))]) == mark_memories(text)
    assert "<button" not in mark_memories(text)


def test_looks_are_for_the_examples_first_and_for_answers_that_have_memories(
    predictions: dict[str, list[Prediction]], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = {0, 1, 2, 4}
    places = to_look_at(predictions, seed=0)
    assert set(places) == used
    wins, losses = report.examples(*report.disagreements(predictions), 0)
    examples = [place for place in (*wins, *losses) if place in used]
    assert places[: len(examples)] == examples
    monkeypatch.setattr(report, "LOOKED_AT", 2)
    assert to_look_at(predictions, seed=0) == places[:2]
    assert to_look_at({"vanilla": predictions["vanilla"]}, seed=0) == []


def test_questions_with_looks_stand_first_and_the_others_in_their_order(
    predictions: dict[str, list[Prediction]],
) -> None:
    looks = {4: [Look(0.5, (GRID,))], 2: [Look(0.5, (GRID,))]}
    answers = page_of(predictions, looks).partition('id="answers"')[2]
    assert re.findall(r"question (\d) &lt;b", answers) == list("24013567")
    assert answers.count('<button type="button" class="chip') == 2


def test_every_arm_is_a_point_of_score_against_time_that_says_which(predictions: dict[str, list[Prediction]]) -> None:
    metrics = recorded(predictions)
    panel = time_panel(metrics)
    assert panel is not None
    tips = Tips(to_svg(panel)).found
    said = {arm: in_words(arm, metrics.arms[arm]["overall"], metrics.intervals[arm]["overall"]) for arm in predictions}
    times = {arm: f"{1000 * metrics.arms[arm]['seconds_per_sample']:.1f} ms" for arm in predictions}
    assert sorted(tips) == sorted(f"{said[arm]}, {times[arm]}" for arm in predictions)
    assert tips[-1].startswith("VisMem: 75.0 % ("), "on top of the others"
    assert tips[-1].endswith("), 25.0 ms")
    for arm in metrics.arms.values():
        arm["seconds_per_sample"] = 0.0
    assert time_panel(metrics) is None, "answers that another program made have no time"
    assert "time" not in evaluation_charts(metrics, predictions, {})


def test_the_arms_differences_are_a_table(predictions: dict[str, list[Prediction]]) -> None:
    page = page_of(predictions)
    pair = recorded(predictions, resamples=20).pairs["short_only"]["vismem"]
    row = page.partition("row minus column")[2].partition("</table>")[0]
    assert "<th>VisMem</th>" in row
    assert f'<td>short only</td><td class="{pair.outcome}">\N{MINUS SIGN}12.5<small>' in row
    assert f"<small>p = {pair.p_holm:.3f}</small>" in row
    del predictions["short_only"]
    assert "row minus column" not in page_of(predictions), "two arms are one difference"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_a_page_that_can_be_written_and_runs_nothing(
    predictions: dict[str, list[Prediction]], text: str
) -> None:
    names = ("task", "question", "reference", "text", "marked_text", "extracted")
    for arm, answers in predictions.items():
        predictions[arm] = [replace(answers[0], **dict.fromkeys(names, text)), *answers[1:]]
    page = page_of(predictions)
    assert page.encode().decode() == page
    assert page.count("<script>") == 1
    assert "<img" not in page
    said = [tip for tip in Tips(page).found if tip.startswith("vanilla, ") and "count" not in tip]
    assert f"vanilla, {text}: 100.0 %".replace("\ud83d", "\N{REPLACEMENT CHARACTER}") in said


def test_a_page_of_many_questions_stays_small_enough_to_open(predictions: dict[str, list[Prediction]]) -> None:
    many = {
        arm: [replace(rows[n % 8], id=str(n), question=f"{n} {'why? ' * 100}") for n in range(5000)]
        for arm, rows in predictions.items()
    }
    page = page_of(many, {n: [Look(0.5, (GRID,))] for n in range(0, 480, 8)})
    assert 4_000_000 < len(page.encode()) < 4_500_000
    assert page.count('<button type="button" class="chip') == 60, "questions with looks are drawn before any other"
