"""The report in a real browser, Debian's Chromium: it fits phones, stays offline, filters, says what is pointed at."""

import io
from collections.abc import Iterator
from dataclasses import replace

import pytest
from handmade import hand_made, recorded
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from vismem.config import Config
from vismem.evaluation import compare, report
from vismem.evaluation.arms import ARMS
from vismem.evaluation.plots import evaluation_charts
from vismem.evaluation.predictions import InvocationRecord
from vismem.evaluation.scored import Scored
from vismem.files import write_text
from vismem.models.attention import Look

STRANGE = [
    "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">",
    "w" * 400,
    "\u202eكم عدد الكلاب في الصورة؟",
    "half \ud83d of a character",
    "e" + "\u0301" * 4,
]
LOOKS = {1: [Look(0.25, (((0.2, 0.0), (0.03, 0.02)),)), Look(0.5, (((0.1, 0.4),),))]}
OVERLAY = """picture => {
  const style = getComputedStyle(picture, "::after");
  return { image: style.backgroundImage, size: style.backgroundSize, width: style.width, height: style.height };
}"""
CUT_OFF = """() => {
  const found = [], right = document.documentElement.clientWidth + 1;
  const say = (element, why) => found.push(`${why}: ${element.tagName} ${element.textContent}`.slice(0, 120));
  for (const element of document.querySelectorAll("main, main *")) {
    const box = element.getBoundingClientRect();
    if (!box.width || element.closest(".scroll, svg, select")) continue;
    if (box.left < -1 || box.right > right) say(element, "outside the window");
    if (element.clientWidth && element.scrollWidth > element.clientWidth + 1) say(element, "wider than its box");
  }
  for (const text of document.querySelectorAll("svg text")) {
    const own = text.getBoundingClientRect(), chart = text.closest("svg").getBoundingClientRect();
    const inside = own.left > chart.left - 1 && own.right < chart.right + 1;
    if (!inside || own.top < chart.top - 1 || own.bottom > chart.bottom + 1) say(text, "outside its chart");
  }
  return found;
}"""


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "gold").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pages of three arms and ten more, of forty questions; some have strange text, pictures, or a look."""
    few = hand_made()
    both = (InvocationRecord(2, "short", False, 0.25), InvocationRecord(9, "long", False, 0.75))
    marked = "seen,<m_I^s> and<m_I^l> answer: 3"
    few["vismem"][1] = replace(few["vismem"][1], marked_text=marked, invocations=both)
    predictions = {}
    for arm in dict.fromkeys([*few, *list(ARMS)[:13]]):
        rows = few.get(arm, few["vanilla"])
        predictions[arm] = [replace(rows[n % 8], id=f"item-{n}") for n in range(40)]
        for place, text in enumerate(STRANGE, 8):
            told = dict.fromkeys(("task", "question", "reference", "text", "marked_text", "extracted"), text)
            predictions[arm][place] = replace(predictions[arm][place], **told)
    metrics = recorded(predictions, resamples=20)
    charts = evaluation_charts(metrics, predictions, {})
    pictures = {"item-1": [picture(400, 200)], "item-9": [picture(20, 300), b"no picture", picture(90, 90)]}
    provenance = {"base model": STRANGE[1], STRANGE[0]: STRANGE[2]}
    folder = tmp_path_factory.mktemp("pages")
    page = report.render(metrics, predictions, charts, pictures.get, provenance, Config().evaluate, LOOKS)
    write_text(folder / "report.html", page)
    arms = {
        arm: {
            row.id: Scored(row.id, row.task, row.reference, row.score, "", row.question, row.marked_text)
            for row in predictions[arm]
        }
        for arm in ("vanilla", "vismem")
    }
    write_text(folder / "compare.html", compare.render(arms, compare.compare(arms, seed=0, resamples=20), seed=0))
    return {name: (folder / f"{name}.html").as_uri() for name in ("report", "compare")}


@pytest.fixture
def url(urls: dict[str, str]) -> str:
    return urls["report"]


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    yield from watched(opened, url)


def watched(opened: Page, url: str) -> Iterator[Page]:
    """The page, which asks for nothing but itself and has no error."""
    asked: list[str] = []
    errors: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda said: errors.append(said.text))
    opened.goto(url)
    yield opened
    title = opened.title()
    opened.close()
    assert errors == []
    assert {address for address in asked if not address.startswith("data:")} == {url}
    assert title in ("VisMem evaluation", "VisMem comparison"), "no text of the data ran"


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("which", ["report", "compare"])
def test_nothing_is_cut_off_on_a_phone_or_a_desk_by_day_or_by_night(
    browser: Browser, urls: dict[str, str], which: str, width: int, scheme: str
) -> None:
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    for page in watched(opened, urls[which]):
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.locator("#more").dispatch_event("click")  # all cards
        expect(page.locator("#answers > article:visible")).to_have_count(40)
        assert page.evaluate(CUT_OFF) == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 29)")


def test_the_cards_are_filtered_by_text_answer_and_memory(page: Page) -> None:
    def found() -> str:
        return page.inner_text("#found").partition(" of ")[0]

    assert found() == "40"
    expect(page.locator("#answers > article:visible")).to_have_count(24)
    page.fill("[name=text]", "QUESTION 3 <b>")
    assert found() == "4", "questions 3, 19, 27 and 35"
    page.fill("[name=text]", "كم عدد")
    assert found() == "1"
    page.fill("[name=text]", "")
    page.select_option("[name=verdict]", "unparsed")
    unread = page.locator("#answers > article:visible")
    expect(unread.first).to_contain_text("unparsed")
    assert int(found()) == unread.count() < 40
    page.select_option("[name=verdict]", "won")
    page.select_option("[name=memory]", "l")
    expect(page.locator("#answers > article:visible .chip.long").first).to_be_visible()
    assert 0 < int(found()) < 24


def test_a_point_says_its_value_to_a_pointer_beside_it(page: Page) -> None:
    dot = page.locator("figure:has-text('Figure 6') [data-tip^='VisMem:']")
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    assert box is not None
    expect(page.locator("#tip")).to_be_hidden()
    page.mouse.move(box["x"] + box["width"] / 2 + 9, box["y"] + box["height"] / 2 + 6)
    expect(page.locator("#tip")).to_have_text(str(dot.get_attribute("data-tip")))
    expect(page.locator("#tip")).to_contain_text("ms")
    page.mouse.move(box["x"] + 100, box["y"] - 200)
    expect(page.locator("#tip")).to_be_hidden()


def test_a_tap_on_a_phone_says_it_too_within_the_window(browser: Browser, url: str) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800}, has_touch=True)
    for page in watched(context.new_page(), url):
        for dot in page.locator("figure:has-text('Figure 6') [data-tip]").all():
            dot.scroll_into_view_if_needed()
            place = dot.bounding_box()
            assert place is not None
            page.touchscreen.tap(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
            tip = page.locator("#tip")
            expect(tip).to_contain_text(str(dot.get_attribute("data-tip")))  # also where dots lie on each other
            box = tip.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 400
    context.close()


def test_a_memory_shows_where_it_looked_over_its_picture(page: Page) -> None:
    card = page.locator("#answers > article").first
    picture = card.locator(".picture")
    assert picture.evaluate(OVERLAY)["image"] == "none"
    seen = []
    for kind in ("short", "long"):
        chip = card.locator(f"button.chip.{kind}")
        chip.hover()
        seen.append(picture.evaluate(OVERLAY))
        expect(page.locator("#tip")).to_contain_text("25 %" if kind == "short" else "50 %")
    page.mouse.move(5, 5)
    assert picture.evaluate(OVERLAY)["image"] == "none"
    assert all(style["image"].startswith('url("data:image/png;base64,') for style in seen)
    assert seen[0]["image"] != seen[1]["image"]
    assert {style["size"] for style in seen} == {"100% 50%"}, "the picture's shape"
    card.locator("button.chip.short").focus()
    assert picture.evaluate(OVERLAY) == seen[0], "the keyboard shows it too"
