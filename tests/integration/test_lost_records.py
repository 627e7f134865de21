"""What the registry has lost of a version, or somebody has changed."""

from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import requests
from project import Project

from vismem.errors import UserError
from vismem.registry import inspect
from vismem.registry.tracking import Store, find_version, open_store


def files_of(project: Project, version: str) -> Path:
    """The folder of a version's run."""
    found = find_version(project.store, version)
    assert found is not None
    return Path(urlparse(project.store.client.get_run(found.run_id).info.artifact_uri).path)


@pytest.mark.parametrize("lost", ["figures", "run"])
def test_a_champion_whose_figures_are_lost_refuses_no_successor(project: Project, lost: str) -> None:
    project.release(b"one", score=66.0)
    if lost == "figures":
        (files_of(project, "1") / "evaluate" / "metrics.json").unlink()
    else:  # as `mlflow gc` removes one
        store = project.store.client._tracking_client.store
        store._hard_delete_run(find_version(project.store, "1").run_id)  # type: ignore[union-attr]
    made = project.release(b"two", score=61.0)
    assert made["promoted"]
    assert "champion version 1 has no usable score" in made["reasons"][-1]


def test_a_champion_whose_figures_were_changed_stops_every_successor(project: Project) -> None:
    project.release(b"one", score=66.0)
    file = files_of(project, "1") / "evaluate" / "metrics.json"
    file.write_text(file.read_text().replace("66.0", "16.0"))
    with pytest.raises(UserError, match=r"not hold a whole evaluate/metrics.json of vismem version 1 \(its sha256"):
        project.release(b"two", score=61.0)
    assert project.champion() == "1"


def test_a_store_that_fails_for_a_moment_lets_no_successor_pass(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.release(b"one", score=66.0)

    def files(store: Store, location: str) -> Any:
        raise requests.ConnectionError("503")

    monkeypatch.setattr(Store, "files", files)
    with pytest.raises(UserError, match=r"not hold a whole evaluate/metrics.json of vismem version \d \(503"):
        project.release(b"two", score=61.0)
    monkeypatch.undo()
    assert project.champion() == "1"


@pytest.mark.parametrize("file", ["evaluate/metrics.json", "validate/validation.json", "validate/profile.json"])
def test_every_record_of_a_version_is_verified(project: Project, file: str) -> None:
    project.release(b"one", score=66.0)
    assert "is as registered" in inspect.verify(project.config, "1")
    (files_of(project, "1") / file).write_text("{}")
    with pytest.raises(UserError, match=f"does not hold a whole {file}"):
        inspect.verify(project.config, "1")


def test_a_gate_of_another_release_is_said_to_be_one(project: Project) -> None:
    project.build(b"one")
    project.run("register")
    project.store.client.set_model_version_tag("vismem", "1", "gate", '{"min_luck": 7}')
    with pytest.raises(UserError, match="tag 'gate' of vismem version 1 is of another release of VisMem"):
        project.run("promote")


@pytest.mark.parametrize("address", ["sqlite:///{}/no.db", "mysql+nodriver://127.0.0.1:9/mlflow"])
def test_a_database_that_is_none_or_has_no_driver_is_one_plain_error(
    project: Project, tmp_path: Path, address: str
) -> None:
    (tmp_path / "no.db").write_text("no database " * 100)
    registry = project.config.registry.model_copy(update={"tracking_uri": address.format(tmp_path)})
    with pytest.raises(UserError, match="does not answer"):
        open_store(registry)
