"""HTML pages that are one file, read offline and in the dark, and run nothing that came from data.

`page.html.j2` is the frame of every report, with the one style sheet, `page.css`; `dvc.html` is that of `dvc plots`.
"""

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from vismem.data.fingerprint import examine_image
from vismem.runtime.images import upright

THUMBNAIL = 168  # pixels, longest side; shown at half of that, for screens with two pixels a point
AS_IT_IS = 16_000  # bytes: a file of a small image up to this size is embedded unchanged
TIPS = Path(__file__).with_name("tips.js").read_text()  # a script for pages whose elements have data-tip
LARGEST = 10_000  # pixels a side: what is larger may be a bomb, and is not decoded


def page_environment(package: str) -> Environment:
    """Jinja for the templates of `package`; everything is escaped, and a missing figure is a fault."""
    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("vismem.pages", ".")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.globals |= {"style": Markup(Path(__file__).with_name("page.css").read_text()), "sha256": _sha256}
    return environment


def thumbnail(data: bytes) -> str | None:
    """A data URI of an encoded image, at most THUMBNAIL pixels a side; None for one that does not decode."""
    facts = examine_image(data, max_side=LARGEST)
    if facts.fault is not None or max(facts.width, facts.height) > LARGEST:
        return None
    with Image.open(io.BytesIO(data)) as image:
        if max(image.size) <= THUMBNAIL and len(data) <= AS_IT_IS and image.format in ("PNG", "JPEG"):
            return data_uri(data, image.format)
        small = upright(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return data_uri(file.getvalue(), "WEBP")


def storable(text: str) -> str:
    """The text with half characters replaced, which JSON can hold and no file can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def data_uri(data: bytes, form: str) -> str:
    """The address of an image that stands in the page itself."""
    return f"data:image/{form.lower()};base64,{base64.b64encode(data).decode()}"


def _sha256(script: Any) -> str:
    """What a Content-Security-Policy calls an inline script: its hash, base64."""
    return base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
