"""A registered version is fetched into a cache that several processes share."""

from pathlib import Path

import pytest
from project import Project

from vismem.config import parse_config
from vismem.errors import UserError
from vismem.provenance import verify_manifest, write_manifest
from vismem.registry import fetch
from vismem.registry.runs import download_bundle
from vismem.registry.tracking import Store
from vismem.registry.versions import Version


def test_of_two_that_fetch_a_version_at_once_the_slower_takes_what_the_other_fetched(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.release(b"one", score=66.0)
    registry, cache = project.config.registry, tmp_path / "cache"

    def overtaken(store: Store, version: Version, folder: Path) -> None:
        download_bundle(store, version, folder)
        monkeypatch.setattr(fetch, "download_bundle", download_bundle)
        fetch.fetch_bundle(registry, "champion", cache)

    monkeypatch.setattr(fetch, "download_bundle", overtaken)
    found = fetch.fetch_bundle(registry, "champion", cache)
    assert (list(cache.iterdir()), verify_manifest(found)) == ([found], [])


def test_what_was_damaged_in_the_cache_is_fetched_again(project: Project, tmp_path: Path) -> None:
    project.release(b"one", score=66.0)
    registry, cache = project.config.registry, tmp_path / "cache"
    found = fetch.fetch_bundle(registry, "champion", cache)
    (found / "vismem" / "memory.safetensors").write_bytes(b"another")
    assert fetch.fetch_bundle(registry, "champion", cache) == found
    assert (list(cache.iterdir()), verify_manifest(found)) == ([found], [])


def test_a_folder_of_the_cache_that_is_sound_but_another_s_is_fetched_again(project: Project, tmp_path: Path) -> None:
    project.release(b"one", score=66.0)
    registry, cache = project.config.registry, tmp_path / "cache"
    found = fetch.fetch_bundle(registry, "champion", cache)
    (found / "vismem" / "memory.safetensors").write_bytes(b"another")
    write_manifest(found)
    assert fetch.fetch_bundle(registry, "champion", cache) == found
    assert (found / "vismem" / "memory.safetensors").read_bytes() == b"one"
    project.store.client.set_model_version_tag("vismem", "1", "manifest_sha256", f"../cache/{found.name}")
    for which, said in (
        ("1", "has no sha256 in its tag"),
        ("champion", "version 1 of 'vismem', the champion, is no longer"),
    ):
        with pytest.raises(UserError, match=said):
            fetch.fetch_bundle(registry, which, cache)


def test_a_version_that_somebody_else_registered_is_refused(project: Project, tmp_path: Path) -> None:
    project.store.client.create_registered_model("vismem")
    project.store.client.create_model_version("vismem", "s3://none/none")
    with pytest.raises(UserError, match="version 1 of 'vismem' is none that `vismem register` made"):
        fetch.fetch_bundle(project.config.registry, "1", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_process_that_goes_to_another_project_s_folder_finds_that_project_s_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for weights in (b"one", b"two"):
        folder = tmp_path / weights.decode()
        Project(folder).release(weights, score=66.0)
        monkeypatch.chdir(folder)
        bundle = fetch.fetch_bundle(parse_config({}).registry, "champion", folder / "cache")
        found.append((bundle / "vismem" / "memory.safetensors").read_bytes())
    assert found == [b"one", b"two"]
