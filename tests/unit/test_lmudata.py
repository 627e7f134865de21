"""VLMEvalKit's benchmark files: what becomes of their rows, and what is said where one cannot be read."""

import base64
import csv
import io
from pathlib import Path

import pytest
from PIL import Image

from vismem.config import LmuDataSource
from vismem.data.readers import lmudata
from vismem.data.sample import Capability, Sample
from vismem.errors import UserError
from vismem.evaluation.answers import score


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = (base64.b64encode(png(colour)).decode() for colour in ("red", "blue"))


def write(folder: Path, *rows: dict[str, str], name: str = "BLINK") -> LmuDataSource:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (folder / f"{name}.tsv").open("w", newline="") as lines:
        table = csv.DictWriter(lines, columns, delimiter="\t", restval="")
        table.writeheader()
        table.writerows(rows)
    return LmuDataSource(kind="lmudata", name=name, path=folder, split="test")


def read(source: LmuDataSource) -> list[Sample]:
    return list(lmudata.read(source, "test", 0))


ROW = {
    "index": "7",
    "image": RED,
    "question": "Which\ncolour?",
    "A": "None",
    "B": "red",
    "answer": "B",
    "category": "c",
}


def test_a_row_becomes_a_question_with_its_options_under_letters(tmp_path: Path) -> None:
    (sample,) = read(write(tmp_path, ROW))
    assert (sample.id, sample.task, sample.source) == ("BLINK-7", "c", "BLINK")
    assert sample.images == (png("red"),)
    assert sample.question == "Which\ncolour?\nA. None\nB. red"
    assert sample.choices == ("None", "red"), "an option that says None is an option"
    assert sample.capability is Capability.UNDERSTANDING
    assert [score(sample, text) for text in ("The answer is B.", "red", "A", "purple")] == [1.0, 1.0, 0.0, 0.0]


def test_images_come_as_base64_as_lists_by_index_and_as_files(tmp_path: Path) -> None:
    (tmp_path / "images" / "BLINK").mkdir(parents=True)
    (tmp_path / "images" / "BLINK" / "b.png").write_bytes(png("blue"))
    plain = {"question": "?", "answer": "yes"}
    source = write(
        tmp_path,
        {"index": "0", "image": "2", **plain},
        {"index": "1", "image": str([RED, BLUE]), **plain},
        {"index": "2", "image": BLUE, **plain},
        {"index": "3", "image_path": "b.png", **plain},
        {"index": "4", "image": BLUE, "question": "?"},
    )
    red, blue = png("red"), png("blue")
    assert [sample.images for sample in read(source)] == [(blue,), (red, blue), (blue,), (blue,)]
    assert len(read(source.model_copy(update={"limit": 2}))) == 2
    assert list(lmudata.read(source, "train", 0)) == []


def test_the_folder_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, ROW).model_copy(update={"path": None})
    monkeypatch.delenv("LMUData", raising=False)
    with pytest.raises(UserError, match="set LMUData"):
        read(source)
    monkeypatch.setenv("LMUData", str(tmp_path))
    assert len(read(source)) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"index": "1", "question": "?"}], "no column answer"),
        ([{**ROW, "image": "99"}], "row 7: `image` names row 99"),
        ([{**ROW, "image": "no base64 " * 9}], "row 7: `image` is neither base64"),
        ([{**ROW, "image": "", "image_path": "gone.png"}], "gone.png: No such file"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, *rows))


def test_a_missing_benchmark_names_those_that_are_there(tmp_path: Path) -> None:
    source = write(tmp_path, ROW)
    with pytest.raises(UserError, match="has BLINK"):
        read(source.model_copy(update={"name": "MMStar"}))
    with pytest.raises(UserError, match="judge"):
        read(source.model_copy(update={"name": "MMVet"}))
