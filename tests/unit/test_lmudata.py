"""VLMEvalKit's benchmark files: what becomes of their rows, and what is said where one cannot be read."""

import base64
import csv
import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from vismem.config import Config, LmuDataSource, PrepareConfig, ValidateConfig
from vismem.data.collate import target_text
from vismem.data.prepare import prepare
from vismem.data.readers import read
from vismem.data.sample import Capability, Sample, read_samples
from vismem.errors import UserError
from vismem.evaluation.answers import score
from vismem.validation.validate import validate


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


def read_all(source: LmuDataSource) -> list[Sample]:
    return list(read(source, "test", 0))


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
    (sample,) = read_all(write(tmp_path, ROW))
    assert (sample.id, sample.task, sample.source) == ("BLINK-7", "c", "BLINK")
    assert sample.images == (png("red"),)
    assert sample.question == "Which\ncolour?\nA. None\nB. red"
    assert sample.choices == ("None", "red"), "an option that says None is an option"
    assert sample.capability is Capability.UNDERSTANDING
    assert [score(sample, text) for text in ("The answer is B.", "red", "A", "purple")] == [1.0, 1.0, 0.0, 0.0]


def test_an_empty_column_is_no_option_and_the_others_keep_their_letters(tmp_path: Path) -> None:
    lettered, spelt = read_all(
        write(tmp_path, {**ROW, "B": "", "C": "red", "D": "blue", "answer": "D"}, {**ROW, "B": "", "C": "red"})
    )
    assert lettered.question == "Which\ncolour?\nA. None\nC. red\nD. blue"
    scores = {reply: score(lettered, reply) for reply in ("D", "blue", "D. blue", "C", "B", "E", "", "answer:")}
    assert [reply for reply, points in scores.items() if points] == ["D", "blue", "D. blue"]
    assert [score(lettered, text) for text in ("So D is correct.", "Figure D shows a sky")] == [1.0, 0.0]
    assert spelt.choices == ("None", "", "red"), "what follows the last option is not kept"
    assert {reply: score(spelt, reply) for reply in ("B", "C", "")} == dict.fromkeys(("B", "C", ""), 0.0)


def test_lettered_rows_pass_validation_and_a_letter_in_reply_scores(tmp_path: Path) -> None:
    """From the file that VLMEvalKit wrote to the score of a reply; only letters without an option are set apart."""
    options = {"A": "a red hat", "B": "", "C": "a blue hat", "D": "a hat"}
    rows = [{**ROW, **options, "index": str(n), "answer": letter} for n, letter in enumerate("ACDACDACDACDACDACDBE")]
    config = Config(
        prepare=PrepareConfig(sources=(write(tmp_path, *rows),)),
        validate=ValidateConfig(required_splits=("test",), max_quarantined=0.1),
    )
    for step, inputs in ((prepare, {}), (validate, {"prepare": tmp_path / "prepare"})):
        out = tmp_path / step.__name__
        out.mkdir()
        step(config, inputs, out)
    kept = read_samples(tmp_path / "validate" / "data" / "test")
    assert [sample.answer for sample in kept] == list("ACD" * 6)
    for sample in kept:
        assert [letter for letter in "ABCDE" if score(sample, f"The answer is {letter}.")] == [sample.answer]
        assert score(sample, target_text(sample)) == 1.0
    apart = pq.read_table(tmp_path / "validate" / "quarantine" / "part-00000.parquet").to_pylist()
    assert [row["reason"] for row in apart] == [
        f"answers_among_choices: the answer '{letter}' is none of the choices" for letter in "BE"
    ]


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
        {"index": "4", "image_path": str(tmp_path / "images" / "BLINK" / "b.png"), **plain},
        {"index": "5", "image": BLUE, "question": "?"},
    )
    red, blue = png("red"), png("blue")
    assert [sample.images for sample in read_all(source)] == [(blue,), (red, blue), (blue,), (blue,), (blue,)]
    assert len(read_all(source.model_copy(update={"limit": 2}))) == 2
    assert list(read(source, "train", 0)) == []


def test_the_folder_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, ROW).model_copy(update={"path": None})
    monkeypatch.delenv("LMUData", raising=False)
    with pytest.raises(UserError, match="set LMUData"):
        read_all(source)
    monkeypatch.setenv("LMUData", str(tmp_path))
    assert len(read_all(source)) == 1


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
        read_all(write(tmp_path, *rows))


def test_a_missing_benchmark_names_those_that_are_there(tmp_path: Path) -> None:
    source = write(tmp_path, ROW)
    with pytest.raises(UserError, match="has BLINK"):
        read_all(source.model_copy(update={"name": "MMStar"}))
    with pytest.raises(UserError, match="judge"):
        read_all(source.model_copy(update={"name": "MMVet"}))
