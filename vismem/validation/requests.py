"""The requests that a server logged (`vismem.serving.request_log`), as rows of facts beside those of training."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from vismem.errors import UserError
from vismem.serving.request_log import FILES

LONGEST = 4_000_000  # bytes of a line; what is longer was not written by a server
COLUMNS = (
    *("request", "manifest_sha256", "memory", "question", "question_chars"),
    *("image_hashes", "min_side", "max_side", "brightness", "tokens", "memories"),
)


class Picture(BaseModel):
    """An image of a request; see `vismem.runtime.images`."""

    sha256: str
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    look: Annotated[str, Field(pattern="^([0-9a-f]{2})+$")]


class Line(BaseModel):
    """One answered request, as far as it is compared."""

    format: Literal[1]
    time: AwareDatetime
    manifest_sha256: str
    request: str
    question: str
    images: tuple[Picture, ...] = Field(min_length=1)
    memory: str
    tokens: int
    memories: dict[str, int]

    def facts(self) -> dict[str, object]:
        """COLUMNS: as in `validation.facts.row_facts`, and how it was answered."""
        looks = b"".join(bytes.fromhex(image.look) for image in self.images)
        sides = [side for image in self.images for side in (image.width, image.height)]
        return self.model_dump(include={"request", "manifest_sha256", "memory", "question", "tokens"}) | {
            "question_chars": len(self.question.strip()),
            "image_hashes": tuple(image.sha256 for image in self.images),
            "min_side": min(sides),
            "max_side": max(sides),
            "brightness": sum(looks) / len(looks),
            "memories": sum(self.memories.values()),
        }


def read_requests(folder: Path, days: float) -> tuple[pd.DataFrame, int]:
    """The facts of the requests of the last `days`, oldest first, and how many lines cannot be read.

    UserError where there is no such folder. A file that the server deletes meanwhile is left out.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: name what `vismem serve --request-log` or `vismem api` writes to")
    oldest, unreadable, found = datetime.now(UTC) - timedelta(days=days), 0, list[Line]()
    for data in _lines(folder):
        try:
            line = Line.model_validate_json(data)
        except ValidationError:
            unreadable += 1
        else:
            found += [line] if line.time >= oldest else []
    found.sort(key=lambda line: line.time)
    return pd.DataFrame([line.facts() for line in found], columns=list(COLUMNS)), unreadable


def _lines(folder: Path) -> Iterator[bytes]:
    """Every line of the files; of one that is too long its beginning."""
    for path in sorted(folder.glob(FILES)):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue
        with file:
            while data := file.readline(LONGEST):
                yield data
                while data and not data.endswith(b"\n"):
                    data = file.readline(LONGEST)
