"""Small files between steps: whole or not at all."""

import os
from pathlib import Path

import pytest

from vismem.errors import UserError
from vismem.files import read_json, write_json, write_text


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    write_json(tmp_path / "new" / "x.json", values)
    assert read_json(tmp_path / "new" / "x.json") == values


def test_a_missing_or_damaged_file_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.json is not there: run `vismem evaluate`"):
        read_json(tmp_path / "x.json", "run `vismem evaluate`")
    (tmp_path / "x.json").write_text('{"a": 1')
    with pytest.raises(UserError, match=r"x\.json is damaged"):
        read_json(tmp_path / "x.json")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "x", "old")

    def full_disk(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "x", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "old")]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"'\.'"):
        write_text(Path(), "where a folder is")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
