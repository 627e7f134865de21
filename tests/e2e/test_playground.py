"""The playground in a real browser, Debian's Chromium: answers, marks, where memories looked, refusals, phones."""

import base64
import io
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from http_calls import endless, ends, served
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from vismem.ask import DEFAULT_MODEL, examples
from vismem.data.sample import Sample
from vismem.generation.torch_executor import TorchExecutor
from vismem.inference import VisMem
from vismem.models.attention import Look
from vismem.runtime.limits import MAX_IMAGE_BYTES
from vismem.serving.answering import Runtime
from vismem.serving.http import create_app
from vismem.serving.playground import add_playground

EXAMPLES = examples()


@pytest.fixture(scope="module")
def model() -> VisMem:
    return VisMem.from_pretrained(DEFAULT_MODEL, device="cpu")


@pytest.fixture(scope="module")
def twice(model: VisMem) -> Sample:
    """An example of one picture whose answer has two memories, both of them short."""
    of_one = [sample for sample in EXAMPLES if len(sample.images) == 1]
    answers = model.answers([(sample.images, sample.question) for sample in of_one])
    kinds = [[memory.kind for memory in answer.invocations] for answer in answers]
    return of_one[kinds.index(["short", "short"])]


@pytest.fixture(scope="module")
def runtime(model: VisMem) -> Runtime:
    return Runtime(TorchExecutor(model.model))


@pytest.fixture(scope="module")
def url(model: VisMem, runtime: Runtime) -> Iterator[str]:
    app = create_app(runtime, "tiny")
    add_playground(app, "tiny", DEFAULT_MODEL, EXAMPLES, model.scope)
    with served(app) as address:
        yield address


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page, which asks nobody but its own server and has no error."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    asked: list[str] = []
    errors: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda said: errors.append(said.text) if "Content Security" in said.text else None)
    opened.goto(url)
    yield opened
    opened.close()
    assert errors == []
    assert {address for address in asked if not address.startswith((url, "data:"))} == set()


def ask(page: Page, question: str | None = None) -> None:
    if question is not None:
        page.fill("#question", question)
    page.click("#ask")
    for card in ("#with", "#without"):
        expect(page.locator(f"{card} .took")).to_contain_text("tokens in", timeout=60_000)


def upload(page: Page, name: str, content: bytes) -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})


def marked(page: Page, card: str) -> str:
    """The answer on the page, with its marks as `Answer.marked` has them."""
    text = "element => [...element.childNodes].map(n => n.kind ? `⟨${n.kind}⟩` : n.textContent).join('').trim()"
    return str(page.locator(f"{card} .text").evaluate(text))


def test_an_uploaded_picture_is_answered_with_marks_beside_the_vanilla_answer(
    page: Page, model: VisMem, runtime: Runtime, twice: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, modes = runtime.stream, list[str]()
    monkeypatch.setattr(runtime, "stream", lambda *a, **b: (modes.append(b["memory"]), own(*a, **b))[1])
    upload(page, "mine.png", twice.images[0])
    expect(page.locator("#about")).to_have_text("mine.png")
    ask(page, twice.question)
    expected = model.answer(twice.images, twice.question)
    assert {memory.kind for memory in expected.invocations} == {"short"}
    assert marked(page, "#with") == expected.marked
    (picture,) = twice.images
    vanilla = chain(*own([Image.open(io.BytesIO(picture))], twice.question, memory="vanilla"))
    assert marked(page, "#without") == "".join(chunk.text for chunk in vanilla).strip()
    assert sorted(modes) == ["learned", "vanilla"], "the policy's own adapter is off too"
    took = page.inner_text("#with .took")
    assert re.match(
        rf"{expected.tokens} tokens in \d+\.\d\d s; the first after \d+\.\d\d s\. The prompt has \d+ ", took
    )
    assert took.endswith(f" {len(expected.invocations)} memories.")
    assert page.inner_text("#right") == ""  # it is no example


def test_a_mark_shows_where_its_memory_looked(page: Page, runtime: Runtime, twice: Sample) -> None:
    page.locator(".examples button").nth(EXAMPLES.index(twice)).click()
    ask(page)
    assert page.inner_text("#right") == f"Right is: {twice.answer}"
    looks: list[Look] = []
    list(runtime.generate([Image.open(io.BytesIO(twice.images[0]))], twice.question, looks=looks))
    marks = page.locator("#with .text .chip")
    assert marks.count() == len(looks) == 2
    expect(page.locator("#heat")).to_be_hidden()
    for number, look in enumerate(looks):
        marks.nth(number).hover()
        expect(page.locator("#heat")).to_be_visible()
        expect(page.locator("#about")).to_contain_text(f"{100 * look.share:.0f} % of this")
        (expected,) = look.maps
        data = str(page.locator("#heat").evaluate("canvas => canvas.toDataURL()"))
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGBA"))
        assert seen.shape[:2] == np.shape(expected)
        assert seen[..., 3].argmax() == np.argmax(expected)  # the darkest cell is where it looked most
        order = np.argsort(np.ravel(expected))
        assert (np.diff(seen[..., 3].ravel()[order].astype(int)) >= 0).all()
    page.mouse.move(5, 5)
    expect(page.locator("#heat")).to_be_hidden()
    marks.first.click()
    page.mouse.move(5, 5)
    expect(page.locator("#heat")).to_be_visible()  # it is pinned
    page.keyboard.press("Escape")
    expect(page.locator("#heat")).to_be_hidden()


def test_what_is_refused_is_said_on_the_page_and_the_next_question_is_answered(page: Page, twice: Sample) -> None:
    upload(page, "text.png", b"no picture")
    page.fill("#question", "what?")
    page.click("#ask")
    for card in ("#with", "#without"):
        expect(page.locator(f"{card} .fault")).to_contain_text("does not decode: it is no PNG, JPEG, WEBP file")
    upload(page, "large.png", bytes(MAX_IMAGE_BYTES + 1))
    expect(page.locator("#about")).to_contain_text("large.png is too large: the limit is 20 MB")
    upload(page, "good.png", twice.images[0])
    page.fill("#question", "a <m_I^s>?")
    page.click("#ask")
    expect(page.locator("#with .fault")).to_contain_text("one of the model's own tokens")
    ask(page, twice.question)
    assert page.locator(".fault").count() == 0


def test_what_comes_from_outside_is_shown_as_text(page: Page, twice: Sample) -> None:
    upload(page, "<img src=x onerror=alert(1)>.png", twice.images[0])
    expect(page.locator("#about")).to_have_text("<img src=x onerror=alert(1)>.png")


def test_a_stopped_question_is_decoded_no_further(page: Page, runtime: Runtime) -> None:
    with endless(runtime):
        page.locator("summary").click()
        page.fill("#tokens", "2000")
        page.click("#ask")
        expect(page.locator("#without .text")).not_to_be_empty()
        page.click("#stop")
        expect(page.locator("#with .took")).to_have_text("Stopped.")
        ends(runtime)


@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_phones_and_is_dark_where_the_system_is(browser: Browser, url: str, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(url)
    ask(page)
    page.locator("#with .text .chip").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    expect(page.locator("#heat")).to_be_in_viewport()  # also on a phone, where answers stand below the picture
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 29)")
    page.close()


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Where the block fails, nobody waits for the process."""
    try:
        yield
    finally:
        process.kill()


def test_the_command_serves_the_page_to_this_machine_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vismem.cli", "playground", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process, ended(process):
        assert process.stdout is not None
        found = re.fullmatch(r"playground: (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", process.stdout.readline())
        assert found is not None
        with urllib.request.urlopen(found[1], timeout=30) as reply:
            assert "VisMem playground" in reply.read().decode()
        rebound = urllib.request.Request(found[1], headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(rebound, timeout=30)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "stopped\n"
        assert process.wait(30) == 0
