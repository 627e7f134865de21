"""Provenance: hashes, manifests and lineage."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from vismem import provenance
from vismem.config import Config
from vismem.provenance import (
    git_state,
    lineage,
    sha256_file,
    sha256_folder,
    verify_manifest,
    versions,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / "inner" / "b.bin").write_bytes(bytes(range(256)) * 1000)
    return tmp_path


def test_a_files_hash_is_that_of_its_bytes(folder):
    assert sha256_file(folder / "a.txt") == hashlib.sha256(b"one").hexdigest()


def test_a_manifest_names_every_file_below_the_folder_but_not_itself(folder):
    files = json.loads(write_manifest(folder).read_text())["files"]
    assert files == {name: sha256_file(folder / name) for name in ("a.txt", "inner/b.bin")}
    write_manifest(folder)  # a second time: the first one does not get in
    assert verify_manifest(folder) == []


def test_a_changed_a_missing_and_an_unknown_file_are_each_named(folder):
    (folder / "gone.txt").write_text("x")
    write_manifest(folder)
    (folder / "a.txt").write_bytes(b"two")
    (folder / "gone.txt").unlink()
    (folder / "new.txt").write_text("y")
    assert verify_manifest(folder) == ["gone.txt is missing", "a.txt has changed", "new.txt is not in the manifest"]


def test_a_folder_without_a_readable_manifest_is_a_problem(folder):
    assert len(verify_manifest(folder)) == 1
    for text in ("{", "[]", "{}", '{"files": 3}', '{"files": "ab"}'):
        (folder / "manifest.json").write_text(text)
        assert "damaged" in verify_manifest(folder)[0], text


def test_a_folders_hash_changes_with_a_byte_and_with_a_name(folder):
    first = sha256_folder(folder)
    assert sha256_folder(folder) == first
    (folder / "a.txt").rename(folder / "c.txt")
    renamed = sha256_folder(folder)
    (folder / "c.txt").write_bytes(b"two")
    assert len({first, renamed, sha256_folder(folder)}) == 3


def test_git_state_gives_the_commit_and_whether_tracked_files_changed(tmp_path, monkeypatch):
    monkeypatch.delenv("VISMEM_GIT_COMMIT", raising=False)
    assert git_state(tmp_path) == {"commit": None, "dirty": None}

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "f").write_text("2")
    assert git_state(tmp_path)["dirty"] is True
    monkeypatch.setenv("VISMEM_GIT_COMMIT", "abc")
    assert git_state(tmp_path) == {"commit": "abc", "dirty": False}


def test_the_commit_is_that_of_the_code_wherever_we_stand(tmp_path, monkeypatch):
    monkeypatch.delenv("VISMEM_GIT_COMMIT", raising=False)
    here = git_state(Path(provenance.__file__).parent)
    monkeypatch.chdir(tmp_path)
    assert git_state() == here


def test_lineage_is_json_and_holds_parameters_versions_and_the_datas_hash(folder):
    (folder / "part-00000.parquet").write_bytes(b"rows")
    found = json.loads(json.dumps(lineage(Config(seed=7), folder, {"base": folder / "inner"})))
    assert found["params"]["seed"] == found["seed"] == 7
    assert "gate" not in found["params"]
    assert found["params"]["validate"]["min_pixels"] == Config().validate_.min_pixels
    assert found["data_sha256"] == sha256_folder(folder, "**/*.parquet")
    assert found["inputs_sha256"] == {"base": sha256_folder(folder / "inner")}
    assert found["versions"]["torch"] == versions()["torch"]
    assert str(folder) not in json.dumps(found)
