"""The listing of registered versions: read from SQLite's tables, held to what MLflow's client says."""

import json
import subprocess
import sys

import pytest
from project import Project

from vismem.errors import UserError
from vismem.registry import listing, release
from vismem.registry.champion import read_view


def test_the_listing_and_a_version_s_page_name_aliases_and_history(project: Project) -> None:
    project.release(b"one", score=66.0)
    project.release(b"two", score=60.0)
    rows = listing.models(project.config)
    assert [(row["version"], row["aliases"], row["verdict"]) for row in rows] == [
        ("2", "challenger", "refused"),
        ("1", "champion", "passed"),
    ]
    assert listing.show(project.config, "champion")["version"] == "1"
    assert [move["action"] for move in listing.show(project.config, "1")["history"]] == ["promote"]
    with pytest.raises(UserError, match="no version or alias '7'"):
        listing.show(project.config, "7")


def test_the_tables_hold_what_mlflow_s_client_says(project: Project) -> None:
    file, config = project.store.database, project.config.registry
    assert file is not None
    assert listing.read_tables(file, "vismem") == read_view(project.store), "before the first version"
    project.release(b"one", score=66.0)
    project.release(b"two", score=68.0)
    release.rollback(project.config)
    project.run("register")
    found = listing.read_tables(file, "vismem")
    assert found == read_view(project.store) == listing.read_registry(config)[0]
    assert (len(found.versions), found.tags) == (2, {"ledger": "the registry"})
    assert listing.read_registry(config) == listing.ask_mlflow(config)
    project.store.client.delete_model_version("vismem", "1")  # the champion: its alias goes with it
    found = listing.read_tables(file, "vismem")
    assert found == read_view(project.store)
    assert found.aliases == {"challenger": "2"}


def test_the_listing_comes_without_mlflow(project: Project) -> None:
    project.release(b"one", score=66.0)
    settings = ["--params", str(project.artifacts.parent / "params.yaml")]
    uri = {"tracking_uri": project.config.registry.tracking_uri}
    (project.artifacts.parent / "params.yaml").write_text(json.dumps({"registry": uri}))
    program = (
        "import sys; from vismem.cli import main\n"
        f"status = main(['models', *{settings}]) + main(['models', 'show', '1', *{settings}])\n"
        "sys.exit(status or 'mlflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "champion" in done.stdout
    assert project.config.registry.model_name in done.stdout


def test_tables_that_are_not_mlflow_s_are_left_to_mlflow(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.release(b"one", score=66.0)
    monkeypatch.setattr(listing, "_OURS", "name = ? AND no_such_column = 1")
    assert [item.version for item in listing.read_registry(project.config.registry)[0].versions] == ["1"]
