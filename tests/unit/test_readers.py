"""The readers: what they yield, and what they say when the data is not as it should be."""

import base64
import io
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vismem.config import EasyVqaSource, JsonlSource, NlvrSource
from vismem.data.readers import nlvr, read
from vismem.data.sample import Capability, Sample, Video
from vismem.errors import UserError

NLVR = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "nlvr"


def png(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(file, "PNG")
    return file.getvalue()


def write_lines(folder: Path, *rows: object) -> JsonlSource:
    path = folder / "mine.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return JsonlSource(kind="jsonl", path=path, split="train")


def row(**changes: object) -> dict[str, object]:
    return {"id": "a", "image": "red.png", "prompt": "Which colour?", "answer": "red"} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(png("red"))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "blue.png").write_bytes(png("blue"))
    return tmp_path


# --- JSONL -----------------------------------------------------------------------------------------------------------


def test_a_jsonl_line_with_all_keys_becomes_the_sample_it_describes(folder: Path) -> None:
    source = write_lines(
        folder,
        {
            "id": 7,
            "images": ["red.png", "more/blue.png"],
            "prompt": "Which one is blue?",
            "answer": 2,
            "choices": ["1", "2"],
            "rationale": "the second is blue,",
            "task": "pick",
            "capability": "reasoning",
            "group": 3,
            "extra": None,
        },
    )
    assert list(read(source, "train", 0)) == [
        Sample(
            id="7",
            images=(png("red"), png("blue")),
            question="Which one is blue?",
            answer="2",
            choices=("1", "2"),
            rationale="the second is blue,",
            task="pick",
            capability=Capability.REASONING,
            source="jsonl:mine.jsonl",
            cluster="3",
        )
    ]


def test_a_jsonl_file_is_read_only_for_its_split_and_up_to_its_limit(folder: Path) -> None:
    source = write_lines(folder, row(id="1"), "", row(id="2"), row(id="3")).model_copy(update={"limit": 2})
    assert [sample.id for sample in read(source, "train", 0)] == ["1", "2"]
    assert list(read(source, "test", 0)) == []


def test_a_null_is_a_key_that_is_left_out(folder: Path) -> None:
    nulls = dict.fromkeys(("images", "videos", "choices", "rationale", "task", "capability", "group"))
    found, expected = (list(read(write_lines(folder, each), "train", 0)) for each in (row(**nulls), row()))
    assert found == expected


def test_a_video_is_a_folder_or_a_list_of_frames_with_their_rate(folder: Path) -> None:
    (folder / "clip").mkdir()
    for name, color in (("0010.png", "green"), ("0002.png", "red"), (".hidden", "white")):
        (folder / "clip" / name).write_bytes(png(color))
    videos = [{"frames": "clip", "fps": 2}, {"frames": ["red.png", "more/blue.png", "red.png"], "fps": 0.5}]
    line = {"id": "a", "prompt": "What happens?", "answer": "it turns", "videos": videos}
    alone, mixed = read(write_lines(folder, line, line | {"image": "red.png"}), "train", 0)
    assert alone.videos == (
        Video((png("red"), png("green")), 2.0),
        Video((png("red"), png("blue"), png("red")), 0.5),
    )
    assert (alone.images, mixed.images, mixed.videos) == ((), (png("red"),), alone.videos)


def test_a_broken_image_is_read_as_it_is(folder: Path) -> None:
    (folder / "red.png").write_bytes(b"not an image")
    assert next(read(write_lines(folder, row()), "train", 0)).images == (b"not an image",)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "b", ', r"mine\.jsonl, line 2: broken JSON"),
        ('{"a": ' * 9000, r"line 2: JSON nested too deeply"),
        ('{"id": 1' + "0" * 5000 + "}", r"line 2: broken JSON \(Exceeds the limit"),
        ('{"id": "b", "prompt": "\\ud800?", "image": "red.png", "answer": "x"}', r"line 2: \\ud800 is half of a char"),
        (row(image="data:image/png;base64,?"), r"line 2: an image is no base64"),
        (row(image="a" * 5000), r"line 2: a+: File name too long"),
        ("[1]", r"line 2: an object .* is needed, not a list"),
        (
            row(image="gone.png"),
            r"line 2: no image file .*gone\.png: paths start at the \.jsonl file's folder, or where --",
        ),
        (row(image="http://a/b.png"), r"line 2: http://a/b\.png is a URL: download it first"),
        (row(image="more"), r"line 2: no image file .*more"),
        ({"id": "b", "image": "red.png", "question": "?", "answer": "red"}, r"line 2: no 'prompt'; the line has 'id'"),
        ({"id": "b", "prompt": "?", "answer": "red"}, r"line 2: no 'image'"),
        (row(images=["red.png"]), r"line 2: has both"),
        (row(answer=["red"]), r"line 2: 'answer' must be a string, got \[\"red\"\]"),
        (row(answer=math.nan), r"line 2: 'answer' must be a string, got NaN"),
        (row(choices="red"), r"line 2: 'choices' must be a list of strings"),
        (row(videos="clip.mp4"), r"line 2: 'videos' must be a list of objects"),
        (row(videos=[{"frames": "more"}]), r"line 2: a video is .*\"fps\".*got \{\"frames\": \"more\"\}"),
        (row(videos=[{"frames": ["gone.png"], "fps": 1}]), r"line 2: no image file .*gone\.png"),
        (row(videos=[{"frames": "red.png", "fps": 2}]), r"line 2: no folder .*red\.png .*fps=2 red/%05d\.png"),
        (
            row(capability="seeing"),
            r"line 2: 'capability' must be one of understanding, .*, generation, got \"seeing\"",
        ),
    ],
)
def test_a_faulty_jsonl_line_is_named_with_its_number(folder: Path, line: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(read(write_lines(folder, row(), line), "train", 0))


def test_an_image_may_be_a_data_uri(folder: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    assert next(read(write_lines(folder, row(image=uri)), "train", 0)).images == (png(),)


def test_text_that_is_not_utf8_is_named_with_its_line(folder: Path) -> None:
    source = write_lines(folder, row())
    source.path.write_bytes(source.path.read_bytes() + '{"id": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        list(read(source, "train", 0))


def test_a_missing_jsonl_file_is_named(tmp_path: Path) -> None:
    source = JsonlSource(kind="jsonl", path=tmp_path / "gone.jsonl", split="train")
    with pytest.raises(UserError, match=r"no JSONL file .*gone\.jsonl"):
        list(read(source, "train", 0))


# --- easy-VQA --------------------------------------------------------------------------------------------------------


def test_easy_vqa_gives_the_number_asked_for_and_the_same_again() -> None:
    source = EasyVqaSource(train=30, validation=20, test=10)
    drawn = {split: list(read(source, split, 3)) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in drawn.items()} == {
        "train": 30,
        "validation": 20,
        "test": 10,
    }
    assert drawn["train"] == list(read(source, "train", 3))
    assert drawn["train"] != list(read(source, "train", 4))
    assert all(sample.answer in sample.choices for rows in drawn.values() for sample in rows)


def test_easy_vqa_validation_shares_no_image_with_train() -> None:
    source = EasyVqaSource(train=6000, validation=3000)
    train, validation = ({s.images for s in read(source, split, 0)} for split in ("train", "validation"))
    assert train & validation == set()


def test_more_easy_vqa_questions_than_there_are_is_an_error_with_the_number_there_is() -> None:
    with pytest.raises(UserError, match="easy_vqa has 9673 questions for test, 9674 are asked for"):
        list(read(EasyVqaSource(test=9674), "test", 0))


# --- NLVR ------------------------------------------------------------------------------------------------------------


def nlvr_repository(folder: Path, orders: tuple[int, ...] = (0, 1)) -> NlvrSource:
    """Two examples of directory 5 and one of directory 6, in the repository's layout."""
    train = folder / "nlvr" / "train"
    lines = []
    for identifier, directory, label in (("72-0", "5", "true"), ("72-3", "5", "false"), ("80-1", "6", "true")):
        lines.append({"identifier": identifier, "directory": directory, "sentence": "There is a box", "label": label})
        (train / "images" / directory).mkdir(parents=True, exist_ok=True)
        for k in orders:
            (train / "images" / directory / f"train-{identifier}-{k}.png").write_bytes(png() + identifier.encode())
    (train / "train.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return NlvrSource(kind="nlvr", path=train, split="train")


def test_the_nlvr_repository_gives_an_example_for_every_box_order_there_is(tmp_path: Path) -> None:
    source = nlvr_repository(tmp_path)
    rows = list(read(source, "train", 0))
    assert [sample.answer for sample in rows] == ["true", "true", "false", "false", "true", "true"]
    assert [sample.images[0].removeprefix(png()) for sample in rows[::2]] == [b"72-0", b"72-3", b"80-1"]
    assert {sample.question for sample in rows} == {"true or false: There is a box"}
    assert list(read(source, "validation", 0)) == []


def test_nlvr_ids_are_unique_and_do_not_show_the_identifier(tmp_path: Path) -> None:
    ids = [sample.id for sample in read(nlvr_repository(tmp_path), "train", 0)]
    assert len(set(ids)) == 6
    assert ids[0] == nlvr.opaque_id("train-72-0-0")
    assert not any("72" in i and "-0-0" in i for i in ids)


def test_an_nlvr_presentation_is_one_cluster_in_all_its_examples_and_box_orders(tmp_path: Path) -> None:
    clusters = [sample.cluster for sample in read(nlvr_repository(tmp_path), "train", 0)]
    assert clusters == ["train-72"] * 4 + ["train-80"] * 2


def test_nlvr_is_read_by_whole_directories(tmp_path: Path) -> None:
    source = nlvr_repository(tmp_path).model_copy(update={"directories": (6,)})
    assert [sample.id for sample in read(source, "train", 0)] == [
        nlvr.opaque_id("train-80-1-0"),
        nlvr.opaque_id("train-80-1-1"),
    ]


def test_nlvr_parquet_and_repository_give_the_same_samples(tmp_path: Path) -> None:
    source = nlvr_repository(tmp_path)
    table = [
        {
            "id": f"train-{identifier}-{k}",
            "image": png() + identifier.encode(),
            "question": "There is a box",
            "answer": label,
            "split": "train",
            "directory": directory,
        }
        for identifier, directory, label in (("72-0", "5", "true"), ("72-3", "5", "false"), ("80-1", "6", "true"))
        for k in (0, 1)
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "train.parquet")
    parquet = source.model_copy(update={"path": tmp_path / "train.parquet"})
    assert list(read(parquet, "train", 0)) == list(read(source, "train", 0))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"id": ["a"], "picture": [b""]}, r"train\.parquet: no column image, question, answer, directory; it has id"),
        (
            {"id": ["a"], "image": ["a.png"], "question": ["x"], "answer": ["true"], "directory": ["1"]},
            "column 'image' must hold the PNG's bytes",
        ),
        (
            {"id": ["a"], "image": [b""], "question": ["x"], "answer": ["maybe"], "directory": ["1"]},
            "row 1: label 'maybe' is neither",
        ),
    ],
)
def test_a_faulty_nlvr_parquet_file_is_explained(tmp_path: Path, columns: dict[str, list[object]], said: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=said):
        list(read(NlvrSource(kind="nlvr", path=tmp_path / "train.parquet", split="test"), "test", 0))


def test_faults_of_an_nlvr_repository_are_explained(tmp_path: Path) -> None:
    source = nlvr_repository(tmp_path, orders=())
    with pytest.raises(UserError, match=r"train\.json, line 1: no image file .*train-72-0-0\.png"):
        list(read(source, "train", 0))
    (source.path / "train.json").write_text('{"identifier": "1-0"}\n')
    with pytest.raises(UserError, match="line 1: no 'directory'"):
        list(read(source, "train", 0))
    (source.path / "train.json").unlink()
    with pytest.raises(UserError, match=r"one \.json file of examples is needed"):
        list(read(source, "train", 0))
    with pytest.raises(UserError, match="no NLVR data at"):
        list(read(source.model_copy(update={"path": tmp_path / "gone"}), "train", 0))


@pytest.mark.skipif(not NLVR.is_dir(), reason=f"the NLVR files are not at {NLVR}")
def test_the_real_nlvr_dev_file_reads_whole() -> None:
    rows = list(read(NlvrSource(kind="nlvr", path=NLVR / "dev.parquet", split="test"), "test", 0))
    assert len(rows) == 989
    assert round(100 * sum(sample.answer == "true" for sample in rows) / len(rows), 1) == 55.3
    assert Image.open(io.BytesIO(rows[0].images[0])).size == (400, 100)
