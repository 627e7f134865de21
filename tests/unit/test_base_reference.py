"""Where a folder of what VisMem adds finds its base again."""

import json
from pathlib import Path

import pytest

from vismem.config import DEFAULT_BASE
from vismem.errors import UserError
from vismem.hub import commit_of
from vismem.models.reference import Base
from vismem.provenance import sha256_folder
from vismem.shipped import shipped
from vismem.sources import find_base


def base_in(folder: Path, weights: bytes = b"weights") -> str:
    """Write a folder with weights; their hash, as a reference has it."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    digest = sha256_folder(folder)
    (folder / "README.md").write_text("no weights")
    return digest


def test_a_reference_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    assert Base.read(tmp_path) is None
    for base in (Base("org/name", "5a5a", "c0ffee"), Base("org/name"), Base("base", "5a5a")):
        base.write(tmp_path)
        assert Base.read(tmp_path) == base
    assert json.loads((tmp_path / "base.json").read_text()) == {"model": "base", "weights_sha256": "5a5a"}


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"model": "x"}'])
def test_a_reference_that_is_damaged_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(UserError, match=r"base\.json is damaged: it lacks model or weights_sha256"):
        Base.read(tmp_path)


def test_the_step_base_says_where_its_copy_came_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run `vismem base` again$"):
        Base.of_step(tmp_path)
    for digest in (None, "5a5a"):
        facts = {"model": "org/name", "source_sha256": digest, "parameters": 1}
        (tmp_path / "metrics.json").write_text(json.dumps(facts))
        assert Base.of_step(tmp_path) == Base("org/name", digest)
    (tmp_path / "metrics.json").write_text(json.dumps(facts | {"source_revision": "c0ffee"}))
    assert Base.of_step(tmp_path) == Base("org/name", "5a5a", "c0ffee")


def test_a_base_of_the_hub_is_fetched_as_it_was_when_the_memory_was_trained_and_why_not_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = {"c0ffee": base_in(tmp_path / "snapshots" / "c0ffee"), None: base_in(tmp_path / "snapshots" / "new", b"new")}

    def download(name: str, revision: str | None, **_: object) -> str:
        if revision not in hub:
            raise OSError("401 Unauthorized")
        return str(tmp_path / "snapshots" / (revision or "new"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = Base("org/name", hub["c0ffee"], "c0ffee").place(tmp_path)
    assert (found, commit_of(tmp_path / "snapshots" / "c0ffee")) == (tmp_path / "snapshots" / "c0ffee", "c0ffee")
    assert commit_of(tmp_path) is None
    with pytest.raises(UserError, match="has other weights"):
        Base("org/name", hub["c0ffee"]).place(tmp_path)
    assert Base("org/name", hub[None], "gone").place(tmp_path) == tmp_path / "snapshots" / "new"
    with pytest.raises(UserError, match=r"has other weights .*\(401 Unauthorized\)"):
        Base("org/name", "5a5a", "gone").place(tmp_path)
    del hub[None]
    with pytest.raises(UserError, match=r"is not on this machine: .*\(401 Unauthorized\)"):
        Base("org/name", "5a5a", "gone").place(tmp_path)


def test_a_base_of_the_hub_that_is_given_in_place_of_a_memory_s_own_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = base_in(tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    own = Base("org/own", digest)
    own.write(tmp_path)
    assert find_base(tmp_path, "org/other") == (own, tmp_path / "snapshot")
    Base("org/own", "5a5a").write(tmp_path)
    with pytest.raises(UserError, match="has other weights than the base"):
        find_base(tmp_path, "org/other")


def test_a_folder_beside_the_reference_comes_before_one_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base_in(tmp_path / "base")
    assert Base("base").place(tmp_path / "memory") == Path("base")
    base_in(tmp_path / "memory" / "base")
    assert Base("base").place(tmp_path / "memory") == tmp_path / "memory" / "base"
    assert Base("base").place() == Path("base")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.safetensors.index.json", {"weight_map": {"a": "model.safetensors", "b": "v2/evil.safetensors"}}),
        ("config.json", {"transformers_weights": "v2/model.safetensors"}),
        ("adapter_config.json", {"base_model_name_or_path": "org/name"}),
    ],
)
def test_a_base_that_would_be_loaded_from_other_files_than_were_hashed_is_another(
    tmp_path: Path, name: str, text: dict[str, object]
) -> None:
    base = Base(str(tmp_path / "base"), base_in(tmp_path / "base"))
    (tmp_path / "base" / "config.json").write_text("{}")
    assert base.place() == tmp_path / "base"
    (tmp_path / "base" / name).write_text(json.dumps(text))
    with pytest.raises(UserError, match="has other weights than the base"):
        base.place()


def test_the_base_that_comes_with_vismem_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Base(DEFAULT_BASE).place() == shipped(DEFAULT_BASE)
    assert Base(DEFAULT_BASE, sha256_folder(shipped(DEFAULT_BASE), "*.safetensors")).place() == shipped(DEFAULT_BASE)
    base_in(tmp_path / DEFAULT_BASE)
    assert Base(DEFAULT_BASE).place() == Path(DEFAULT_BASE), "a folder of that name comes first"


def test_only_weights_are_compared_and_others_are_refused(tmp_path: Path) -> None:
    digest = base_in(tmp_path / "base")
    assert Base("base", digest).place(tmp_path) == tmp_path / "base"
    with pytest.raises(UserError, match="/base has other weights than the base that the memory was trained on"):
        Base("base", "5a5a").place(tmp_path)


def test_a_hub_id_is_left_to_the_hub_but_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    assert Base("org/name").place(tmp_path) == "org/name"
    for gone in (Base("./gone"), Base("org/name/more"), Base("org/name", "5a5a"), Base("gone")):
        with pytest.raises(UserError, match=f"^the base '{gone.model}' is not on this machine: say where it is with"):
            gone.place(tmp_path)


def test_hub_ids_and_what_comes_with_vismem_are_found_by_other_machines_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base_in(tmp_path / "org" / "here")
    found = {name: Base(name).everywhere for name in (DEFAULT_BASE, "org/name", "org/here", "./base", "base")}
    assert found == {DEFAULT_BASE: True, "org/name": True, "org/here": False, "./base": False, "base": False}
