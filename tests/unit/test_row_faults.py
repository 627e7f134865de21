"""What `vismem init` says of a row is what `validate` would set it apart for."""

import io
import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from tokenizers import Tokenizer, models

from vismem.config import ValidateConfig
from vismem.data.fingerprint import image_cache
from vismem.data.sample import Sample, Video, write_shards
from vismem.runtime.reserved import Reserved
from vismem.validation.rows import row_faults
from vismem.validation.validate import examine

SETTINGS = ValidateConfig(max_pixels=100, max_question_chars=20)
RESERVED = Reserved(Tokenizer(models.WordLevel()), ("<image>", "<m_I^s>"))


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 0)).save(file, "PNG")
    return file.getvalue()


ROWS = {
    "good": Sample("a", (png(40, 40),), "how many?", "2"),
    "choices": Sample("b", (png(41, 41),), "how many?", "2", choices=("1", "2")),
    "no id": Sample(" ", (png(42, 42),), "how many?", "2"),
    "no image": Sample("c", (), "how many?", "2"),
    "broken image": Sample("d", (b"no image",), "how many?", "2"),
    "small": Sample("e", (png(43, 20),), "how many?", "2"),
    "large": Sample("f", (png(43, 101),), "how many?", "2"),
    "no question": Sample("g", (png(44, 44),), " ", "2"),
    "long question": Sample("h", (png(45, 45),), "how many are there in all?", "2"),
    "no answer": Sample("i", (png(46, 46),), "how many?", ""),
    "other answer": Sample("j", (png(47, 47),), "how many?", "3", choices=("1", "2")),
    "video": Sample("k", (png(48, 48),), "how many?", "2", videos=(Video((png(49, 49),), 2.0),)),
    "token": Sample("m", (png(50, 50),), "an <image> or <image>?", "2", rationale="<image> <m_I^s>"),
    "two faults": Sample("l", (png(20, 20),), "how many?", ""),
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Why Great Expectations sets each row apart."""
    folder: Path = tmp_path_factory.mktemp("prepared")
    for split, rows in (("train", ROWS.values()), ("validation", ()), ("test", ())):
        write_shards(rows, folder / split)
    findings = examine(SETTINGS, folder, RESERVED, folder)
    names = pd.Series(list(ROWS))
    return {names[position]: findings.reasons.get(index, "") for index, position in findings.rows["position"].items()}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_s_faults_are_those_that_the_judge_finds(name: str, judged: dict[str, str]) -> None:
    faults = row_faults(ROWS[name], SETTINGS, image_cache(SETTINGS.max_pixels), RESERVED)
    assert re.sub(r"(^|; )[a-z_]+: ", r"\1", judged[name]) == "; ".join(faults)  # without the rules' names
    assert bool(faults) == (name not in ("good", "choices"))
