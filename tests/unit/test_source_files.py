"""What a run reads from outside `data/`: DVC sees that it has changed by a record of it there."""

import itertools
import json
from pathlib import Path

import pytest

from vismem.config import Config, parse_config
from vismem.data.source_files import RECORD, files_of, fingerprint, record_outside


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for place in ("assets/tiny-vlm", "mine/base"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model.safetensors").write_text("weights")
    return tmp_path


def with_base(model: str) -> Config:
    return parse_config({"base": {"model": model}})


def test_a_base_of_one_s_own_that_was_changed_in_place_is_noticed(folder: Path) -> None:
    def seen() -> str:
        record_outside(with_base("mine/base"))
        return RECORD.read_text()

    before = seen()
    assert seen() == before
    (folder / "mine" / "base" / "model.safetensors").write_text("weights, trained on")
    after = seen()
    assert after != before
    (folder / "mine" / "base" / "tokenizer.json").write_text("{}")
    assert seen() not in (before, after)


def test_of_a_folder_of_questions_only_the_pictures_that_they_name_count(folder: Path) -> None:
    frames = {"frames": "clip", "fps": 1}
    rows = [
        {"image": "a.png"},
        {"images": ["b.png", "data:image/png;base64,AA=="]},
        {"videos": [frames]},
        {"image": 3},
        {"image": "a" * 5000},
        {"image": "\0"},
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (folder / "clip").mkdir()
    names = ("a.png", "b.png", "clip/1.png", "unnamed.png")
    for name in names:
        (folder / name).write_text("pixels")
    config = parse_config({"prepare": {"sources": [{"kind": "jsonl", "path": "mine.jsonl", "split": "train"}]}})

    def seen() -> str:
        record_outside(config)
        return RECORD.read_text()

    found = [seen()]
    for name in (*names, "mine.jsonl"):
        (folder / name).write_text(f"other {(folder / name).read_text()}" if name != "mine.jsonl" else "")
        found.append(seen())
    changed = [before != after for before, after in itertools.pairwise(found)]
    assert changed == [True, True, True, False, True]


def test_what_a_row_names_outside_the_folder_is_not_looked_at(folder: Path) -> None:
    (folder / "data").mkdir()
    names = ({"image": "../mine/base/model.safetensors"}, {"videos": [{"frames": str(folder / "mine"), "fps": 1}]})
    (folder / "data" / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in names))
    source = {"kind": "jsonl", "path": "data/mine.jsonl", "split": "train"}
    (made,) = parse_config({"prepare": {"sources": [source]}}).prepare.sources
    assert files_of(made) == [Path("data/mine.jsonl")]


def test_a_file_that_goes_meanwhile_is_not_counted(folder: Path) -> None:
    there = folder / "mine" / "base" / "model.safetensors"
    assert fingerprint([there, folder / "gone"]) == fingerprint([there])


@pytest.mark.parametrize("model", ["assets/tiny-vlm", "Qwen/Qwen2.5-VL-7B-Instruct"])
def test_the_base_that_comes_with_vismem_and_one_of_the_hub_leave_no_record(folder: Path, model: str) -> None:
    record_outside(with_base(model))
    assert not RECORD.exists()
