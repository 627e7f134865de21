"""VLMEvalKit's benchmark files: what becomes of their rows, and what is said where one cannot be read."""

import base64
import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import Tokenizer, models

from vismem.config import Config, LmuDataSource, PrepareConfig, ValidateConfig
from vismem.data.collate import target_text
from vismem.data.fingerprint import image_cache
from vismem.data.prepare import prepare
from vismem.data.readers import read
from vismem.data.sample import Capability, Sample, read_samples
from vismem.errors import UserError
from vismem.evaluation.answers import score
from vismem.runtime.chat import IMAGE, MARK
from vismem.runtime.reserved import Reserved
from vismem.validation.rows import row_faults
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
    rows = [
        {**ROW, **options, "index": str(n), "question": f"Which has {n}?", "answer": letter}
        for n, letter in enumerate("ACDACDACDACDACDACDBE")
    ]
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
    images = [(blue,), (red, blue), (blue,), (blue,), (blue,), (blue,)]
    assert [sample.images for sample in read_all(source)] == images
    assert read_all(source)[5].answer == "", "for `validate` to count"
    assert len(read_all(source.model_copy(update={"limit": 2}))) == 2
    assert list(read(source, "train", 0)) == []


@pytest.mark.parametrize(
    ("texts", "question", "shown"),
    [
        ({"question": "What changed?"}, "What changed?", "rb"),
        ({"question": "From <image 1> to <image 2>?"}, "From <image> to <image>?", "rb"),
        ({"question": "To <image 2> from <image 1>?"}, "To <image> from <image>?", "br"),
        ({"question": "See <image 1>. Is <image 1> or <image 2>?"}, "See <image>. Is <image> or <image>?", "rrb"),
        ({"question": "What is <image 2>?"}, "<image>What is <image>?", "rb"),
        ({"question": "What is <image 3>, <image 2>?"}, "<image>What is image 3, <image>?", "rb"),
        ({"question": "Is <image> left of <image>?"}, "Is <image> left of <image>?", "rb"),
        ({"hint": "<image 2> helps.", "question": "And <image 1>?"}, "<image> helps.\nAnd <image>?", "br"),
    ],
)
def test_images_stand_where_the_text_names_them(
    tmp_path: Path, texts: dict[str, str], question: str, shown: str
) -> None:
    row = {"index": "1", "image": str([RED, BLUE]), "answer": "yes"}
    (sample,) = read_all(write(tmp_path, {**row, **texts}))
    assert (sample.question, sample.images) == (question, tuple({"r": png("red"), "b": png("blue")}[i] for i in shown))


@pytest.mark.parametrize("names", [("<image 2>", "<image 1>"), ("<image>", "<image>")])
def test_options_that_are_images_have_texts_of_their_own(tmp_path: Path, names: tuple[str, str]) -> None:
    row = {"index": "1", "image": str([RED, BLUE]), "question": "Which is red?", "answer": "B"}
    (sample,) = read_all(write(tmp_path, {**row, "A": names[0], "B": names[1]}))
    assert sample.question == "Which is red?\nA. <image>\nB. <image>"
    assert sample.turns()[0].parts == ("Which is red?\nA. ", IMAGE, "\nB. ", IMAGE)
    assert sample.choices == ("image 1", "image 2")
    assert [score(sample, reply) for reply in ("B", "A", "image 2")] == [1.0, 0.0, 1.0]


def test_a_mark_is_never_shown_as_text_and_no_fault_of_a_row(tmp_path: Path) -> None:
    (sample,) = read_all(write(tmp_path, {**ROW, "question": "<image 1> Which colour has <image 1>?"}))
    assert sample.turns()[0].parts[:3] == (IMAGE, " Which colour has ", IMAGE)
    reserved = Reserved(Tokenizer(models.WordLevel()), (MARK,))
    assert row_faults(sample, ValidateConfig(), image_cache(), reserved) == []
    faulty = replace(sample, question=f"{sample.question} {MARK}")
    assert "<image> in 'question'" in row_faults(faulty, ValidateConfig(), image_cache(), reserved)[0]


def test_mmmu_s_dev_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{**ROW, "index": str(n), "split": split} for n, split in enumerate(("dev", "validation", "dev"))]
    source = write(tmp_path, *rows, name="MMMU_DEV_VAL")
    assert "2 rows left out" in prepare(Config(prepare=PrepareConfig(sources=(source,))), {}, tmp_path / "out")
    (kept,) = read_samples(tmp_path / "out" / "test")
    assert (kept.id, kept.part) == ("MMMU_DEV_VAL-1", "validation")
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())["splits"]["test"]
    assert (stats["rows"], stats["dropped"]) == (1, {"MMMU_DEV_VAL, part dev": 2})


def test_base64_may_be_wrapped_or_a_data_uri_and_the_file_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    wrapped = "\n".join(RED[at : at + 76] for at in range(0, len(RED), 76))
    rows = [{**ROW, "image": image} for image in (wrapped, f"data:image/png;base64,{RED}", str([wrapped]))]
    source = write(tmp_path, *rows)
    file = tmp_path / "BLINK.tsv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [sample.images for sample in read_all(source)] == [(png("red"),)] * 3
    file.write_bytes(file.read_bytes() + "8\té".encode("latin-1"))
    with pytest.raises(UserError, match=r"BLINK\.tsv, behind line \d+: not UTF-8 text .*: save the file as UTF-8"):
        read_all(source)


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
        ([{**ROW, "image": "[" * 5000}], "row 7: `image` is neither base64"),
        ([{**ROW, "image": "", "image_path": "[{[]: 1}]"}], "row 7: `image` is neither base64"),
        ([{**ROW, "image": "data:image/png," + "A" * 99}], "row 7: .* begins with data:image/png;base64"),
        ([{**ROW, "image": "", "image_path": "../../../secret.png"}], "outside the source's folder"),
        ([{**ROW, "image": "", "image_path": "gone.png"}], "gone.png: No such file"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_all(write(tmp_path, *rows))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '8\t"Is it\tred\n9\tIs it "red?\tno',
            "line 4: no tab-separated table",
        ),  # a quote that is closed rows below
        ('8\t"Is it red?\tno\n9\tIs it?\tno', "line 4: no tab-separated table"),  # never
        ("8\tIs it\tred?\tno", "line 3: a row of other columns"),
        ("8\tIs it", "line 3: a row of other columns"),
    ],
)
def test_a_row_that_would_swallow_others_or_shift_its_columns_is_refused(
    tmp_path: Path, line: str, message: str
) -> None:
    source = write(tmp_path, {"index": "7", "question": "Is it?", "answer": "no"})
    with (tmp_path / "BLINK.tsv").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=message):
        read_all(source)


def test_a_limit_counts_what_the_score_is_of(tmp_path: Path) -> None:
    rows = [{**ROW, "index": str(n), "split": split} for n, split in enumerate(("dev", "validation", "dev", "dev"))]
    source = write(tmp_path, *rows, {**ROW, "index": "4", "split": "validation"}, name="MMMU_DEV_VAL")
    assert [sample.id[-1] for sample in read_all(source.model_copy(update={"limit": 1}))] == ["0", "1"]


def test_answers_that_are_lists_of_texts_are_refused_but_those_of_benchmarks_that_we_know(tmp_path: Path) -> None:
    row = {"index": "7", "image": RED, "question": "What is written?", "answer": "['CENTRE']"}
    for name in ("OCRBench", "TextVQA_VAL"):
        with pytest.raises(UserError, match=f"row 7: the answer is a list, and {name} counts those"):
            read_all(write(tmp_path, row, name=name))
    (known,) = read_all(write(tmp_path, row, name="MMMU_DEV_VAL"))
    assert score(known, "CENTRE") == 1.0
    for answer in ("[0, 4]", "[left]", "[]"):
        assert read_all(write(tmp_path, row | {"answer": answer}, name="Ours"))[0].answer == answer


@pytest.mark.parametrize("group", [{}, {"g_index": "7"}])
def test_of_a_question_that_is_asked_in_every_order_of_its_options_the_first_is_read(
    tmp_path: Path, group: dict[str, str]
) -> None:
    turned = {"index": "1000007", "image": "7", "A": "red", "B": "None", "answer": "A"}
    other = {"index": "2000008"} | {name: "2000008" for name in group}  # no order of a question that is there
    rows = [ROW | group, ROW | group | turned, ROW | other]
    for name, kept in (("MMBench_DEV_EN", ["7", "2000008"]), ("Ours", ["7", "1000007", "2000008"])):
        samples = read_all(write(tmp_path, *rows, name=name))
        assert [sample.id for sample in samples] == [f"{name}-{index}" for index in kept]
    assert len(read_all(write(tmp_path, ROW, {**ROW, "index": "x"}, name="MMBench_DEV_EN"))) == 2


def test_a_missing_benchmark_names_those_that_are_there(tmp_path: Path) -> None:
    source = write(tmp_path, ROW)
    with pytest.raises(UserError, match="has BLINK"):
        read_all(source.model_copy(update={"name": "MMStar"}))
    with pytest.raises(UserError, match="judge"):
        read_all(source.model_copy(update={"name": "MMVet"}))
