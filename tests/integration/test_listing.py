"""What is registered, looked at: listed from SQLite's tables as from MLflow's client, compared, and verified."""

import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest
from project import Project

from vismem.errors import UserError
from vismem.registry import inspect, listing, release


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
    assert listing.read_tables(file, "vismem") == listing.ask_mlflow(config), "before the first version"
    project.release(b"one", score=66.0)
    project.release(b"two", score=68.0)
    release.rollback(project.config)
    project.run("register")
    found = listing.read_tables(file, "vismem")
    assert found == listing.ask_mlflow(config) == listing.read_registry(config)
    assert (len(found[0].versions), found[1].revision) == (2, 3)
    project.store.client.delete_model_version("vismem", "1")  # the champion: its alias goes with it
    found = listing.read_tables(file, "vismem")
    assert found == listing.ask_mlflow(config)
    assert found[0].aliases == {"challenger": "2"}


def test_nothing_changes_between_two_questions_to_the_tables(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.release(b"one", score=66.0)
    ask, config = listing._versions, project.config.registry

    def ask_then_change(*given: Any) -> Any:
        found = ask(*given)
        with closing(sqlite3.connect(project.store.database, timeout=0)) as other:
            other.execute("DELETE FROM model_version_tags")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.commit()
        return found

    monkeypatch.setattr(listing, "_versions", ask_then_change)
    assert listing.read_registry(config)[1].champion == "1"


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


def test_versions_scored_on_other_data_are_not_compared(project: Project) -> None:
    project.release(b"one", score=66.0)
    project.build(b"two", score=68.0, n=500)
    project.run("register")
    rows, said = inspect.compare(project.config, "champion", "challenger")
    assert {"figure": "gain over vanilla", "version 1": "6.000", "version 2": "6.000", "difference": "+0.000"} in rows
    assert said == "they were scored on other data (600 and 500 items): their scores do not compare"
    with pytest.raises(UserError, match="champion and 1 are both version 1: name two"):
        inspect.compare(project.config, "champion", "1")


def test_a_version_is_verified_against_manifest_lineage_figures_and_tags(project: Project) -> None:
    made = project.release(b"one", score=66.0)
    assert re.match(r"vismem version 1 is as registered: 6 files and ", inspect.verify(project.config, "champion"))
    client = project.store.client
    client.set_model_version_tag("vismem", "1", "score", "99.0000")
    with pytest.raises(UserError, match=r"not as registered: tag score says 99\.0000, the files 66\.0000"):
        inspect.verify(project.config, "1")
    client.set_model_version_tag("vismem", "1", "score", "66.0000")
    kept = project.artifacts.parent / "mlartifacts" / "models" / made["model_id"] / "artifacts" / "bundle"
    (kept / "vismem" / "memory.safetensors").write_bytes(b"onE")
    with pytest.raises(UserError, match=r"version 1 .* damaged: vismem/memory\.safetensors has changed"):
        inspect.verify(project.config, "1")
