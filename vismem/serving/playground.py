"""The page of `vismem playground`: a picture, a question, and the answers with memory and without, side by side.

It is one file that asks the endpoint of the same server (`vismem.serving.http`), so that its limits are the endpoint's.
Nothing else is loaded: the page's own policy forbids it.
"""

import base64
from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from vismem.data.sample import Sample
from vismem.pages import page_environment
from vismem.runtime.limits import FORMATS, MAX_IMAGE_BYTES, MAX_NEW_TOKENS, NEW_TOKENS
from vismem.scope import Scope

SCRIPT = Path(__file__).with_name("playground.js")


def add_playground(
    app: FastAPI,
    name: str,
    model: str,
    examples: Sequence[Sample],
    scope: Scope | None,
    new_tokens: int = NEW_TOKENS,
) -> None:
    """Add the page at `/` of an endpoint whose model is called `name`; `model` is what people call it.

    `examples` have one image each; `new_tokens`: the longest answer, which the page lets change.
    """
    pictures = [(base64.b64encode(sample.images[0]).decode(), sample) for sample in examples]
    page = page_environment("vismem.serving").get_template("playground.html.j2")
    html = page.render(
        name=name,
        model=model,
        pictures=pictures,
        scope=scope,
        new_tokens=new_tokens,
        most_tokens=MAX_NEW_TOKENS,
        accepted=",".join(f"image/{form.lower()}" for form in FORMATS),
        megabytes=MAX_IMAGE_BYTES // 1_000_000,
        script=Markup(SCRIPT.read_text()),
        connect=True,
    )

    @app.get("/", response_class=HTMLResponse)
    def playground() -> str:
        return html
