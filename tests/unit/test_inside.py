"""Files that data names: every reader refuses one outside its source's folder, and names the row and the path."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vismem.config import JsonlSource, LmuDataSource, NlvrSource
from vismem.data.readers import read
from vismem.data.sample import Sample
from vismem.errors import UserError

SECRET = b"what nobody is to read"
Reader = Callable[[Path, str], Iterator[Sample]]  # the samples of a source in a folder whose only row names that path


def line(**fields: Any) -> str:
    return json.dumps({"id": "1", "prompt": "?", "answer": "a", **fields}) + "\n"


def json_lines(folder: Path, text: str) -> Iterator[Sample]:
    (folder / "mine.jsonl").write_text(text)
    return read(JsonlSource(kind="jsonl", path=folder / "mine.jsonl", split="test"), "test", 0)


def jsonl_image(folder: Path, name: str) -> Iterator[Sample]:
    return json_lines(folder, line(image=name))


def jsonl_frame(folder: Path, name: str) -> Iterator[Sample]:
    return json_lines(folder, line(videos=[{"frames": [name], "fps": 1}]))


def lmudata_image(folder: Path, name: str) -> Iterator[Sample]:
    (folder / "images" / "BLINK").mkdir(parents=True, exist_ok=True)
    (folder / "BLINK.tsv").write_text(f"index\tquestion\tanswer\timage_path\n1\t?\ta\t../../{name}\n")
    if Path(name).is_absolute():
        (folder / "BLINK.tsv").write_text(f"index\tquestion\tanswer\timage_path\n1\t?\ta\t{name}\n")
    return read(LmuDataSource(kind="lmudata", name="BLINK", path=folder, split="test"), "test", 0)


def nlvr_image(folder: Path, name: str) -> Iterator[Sample]:
    """NLVR makes a path of its own of what a line says: here of the directory."""
    row = {"identifier": "1-0", "directory": str(Path("..") / Path(name).parent), "sentence": "?", "label": "true"}
    (folder / "train.json").write_text(json.dumps(row) + "\n")
    return read(NlvrSource(kind="nlvr", path=folder, split="test"), "test", 0)


READERS = (jsonl_image, jsonl_frame, lmudata_image, nlvr_image)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A source's folder that is a link itself, with a file inside it and one beside it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "source").symlink_to("real")
    for place in (tmp_path / "real", tmp_path / "beside"):
        (place / "more").mkdir(parents=True, exist_ok=True)
        (place / "more" / "train-1-0-0.png").write_bytes(SECRET)
    return tmp_path / "source"


def refuse(rows: Iterator[Sample], where: str) -> None:
    with pytest.raises(UserError, match=rf"{where}.*train-1-0-0\.png.*beside.*outside the source's folder"):
        list(rows)


@pytest.mark.parametrize("read_one", READERS)
def test_a_file_inside_the_folder_is_read(folder: Path, read_one: Reader) -> None:
    (found,) = read_one(folder, "more/train-1-0-0.png")
    assert [*found.images, *(frame for video in found.videos for frame in video.frames)] == [SECRET]


@pytest.mark.parametrize("read_one", READERS)
def test_two_dots_that_lead_out_are_refused(folder: Path, read_one: Reader) -> None:
    refuse(read_one(folder, "../beside/more/train-1-0-0.png"), "(line|row) 1")


@pytest.mark.parametrize("read_one", READERS)
def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_read(folder: Path, read_one: Reader) -> None:
    for name, target in (("stays", "more"), ("leads", "../beside/more")):
        (folder / name).symlink_to(target)
    assert len(list(read_one(folder, "stays/train-1-0-0.png"))) == 1
    with pytest.raises(UserError, match=r"1: .*outside the source's folder"):
        list(read_one(folder, "leads/train-1-0-0.png"))


@pytest.mark.parametrize("read_one", READERS[:3])
def test_an_absolute_path_is_refused_unless_it_is_inside(folder: Path, read_one: Reader) -> None:
    assert len(list(read_one(folder, str(folder / "more" / "train-1-0-0.png")))) == 1
    refuse(read_one(folder, str(folder.parent / "beside" / "more" / "train-1-0-0.png")), "(line|row) 1")
    gone = str(folder.parent / "beside" / "gone.png")
    with pytest.raises(UserError, match=f"{re.escape(gone)}.*outside"):  # nobody learns what is there
        list(read_one(folder, gone))


def test_a_folder_of_frames_is_refused_outside_and_so_is_a_frame_in_it_that_is_a_link(folder: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: .*\.\./beside.*outside the source's folder"):
        list(json_lines(folder, line(videos=[{"frames": "../beside/more", "fps": 1}])))
    (folder / "more" / "link.png").symlink_to("../../beside/more/train-1-0-0.png")
    with pytest.raises(UserError, match=r"line 1: .*link\.png leads to .*beside.*outside the source's folder"):
        list(json_lines(folder, line(videos=[{"frames": "more", "fps": 1}])))


def test_what_is_no_path_at_all_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: .*a\\x00b.* is no path"):
        list(jsonl_image(folder, "a\0b"))
    (folder / "round.png").symlink_to("round.png")
    with pytest.raises(UserError, match=r"line 1: .*round\.png"):
        list(jsonl_image(folder, "round.png"))
