"""From a version to the data that it was trained on, and from a revision of the data to its versions."""

import json
import re
from pathlib import Path

import pytest
from dvc_project import DvcProject
from project import Project

from vismem.cli import main
from vismem.data.revisions import DataRevision, write_revisions
from vismem.files import read_json, write_json
from vismem.provenance import write_manifest
from vismem.registry import inspect, listing
from vismem.registry.tracking import find_version

FIRST = DataRevision(
    repo="https://example.com/data.git",
    rev="v1",
    commit="1a" * 20,
    path="data/scans",
    md5=f"{'2b' * 16}.dir",
    remote="s3://bucket/dvc",
)


def register(project: Project, weights: bytes, *revisions: DataRevision) -> dict[str, str]:
    """A version that was trained on these revisions, as `validate` and `export` hand them on."""
    project.build(weights)
    write_revisions(project.steps["validate"], revisions)
    lineage = project.steps["export"] / "lineage.json"
    write_json(lineage, {**read_json(lineage), "revisions": [revision.model_dump() for revision in revisions]})
    write_manifest(project.steps["export"])
    return dict(project.run("register"))


def versions(project: Project, data: str) -> list[str]:
    return [row["version"] for row in listing.models(project.config, data)]


def test_a_version_s_tags_and_its_run_s_inputs_say_what_it_was_trained_on(project: Project) -> None:
    images = FIRST.model_copy(update={"path": "data/images", "md5": f"{'3c' * 16}.dir"})
    made = register(project, b"one", FIRST, images)
    version = find_version(project.store, made["version"])
    assert version is not None
    assert {key: version.tags[key] for key in ("data_rev", "data_commit", "data_path", "data_md5", "data_remote")} == {
        "data_rev": "v1, v1",
        "data_commit": f"{FIRST.commit}, {FIRST.commit}",
        "data_path": "data/scans, data/images",
        "data_md5": f"{FIRST.md5}, {images.md5}",
        "data_remote": "s3://bucket/dvc, s3://bucket/dvc",
    }
    inputs = project.store.client.get_run(made["run_id"]).inputs.dataset_inputs
    assert {(item.dataset.name, item.dataset.digest, item.dataset.source_type) for item in inputs} == {
        ("data/scans", FIRST.md5, "dvc"),
        ("data/images", images.md5, "dvc"),
    }
    assert sorted(DataRevision(**json.loads(item.dataset.source)).md5 for item in inputs) == [FIRST.md5, images.md5]
    assert "as registered" in inspect.verify(project.config, made["version"])


def test_versions_are_found_by_their_data_s_revision_commit_or_md5(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    second = FIRST.model_copy(update={"rev": "v2", "commit": "4d" * 20, "md5": f"{'5e' * 16}.dir"})
    register(project, b"one", FIRST)
    register(project, b"two", second)
    register(project, b"three", FIRST.model_copy(update={"rev": "main"}))
    register(project, b"four")
    assert versions(project, "v1") == ["1"], "by its name alone, which this project does not know"
    for name in (FIRST.commit, FIRST.commit[:8], FIRST.md5, FIRST.md5[:8]):
        assert versions(project, name) == ["3", "1"]
    assert versions(project, second.md5) == ["2"]
    assert versions(project, "v") == versions(project, "1a1a") == versions(project, "v9") == []
    assert versions(project, "") == ["4", "3", "2", "1"]
    params = project.artifacts.parent / "params.yaml"
    params.write_text(json.dumps({"registry": {"tracking_uri": project.config.registry.tracking_uri}}))
    assert main(["models", "list", "--data", "v1", "--params", str(params)]) == 0
    assert "66.0000" in capsys.readouterr().out
    assert main(["models", "list", "--data", "v9", "--params", str(params)]) == 1
    assert re.search("no version of 'vismem' in .* was trained on v9", capsys.readouterr().err)
    assert main(["models", "show", "--data", "v1", "--params", str(params)]) == 1
    assert "--data goes with `vismem models list` only" in capsys.readouterr().err


def test_a_revision_of_this_project_means_its_data_whatever_commit_a_version_was_trained_at(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    data = DvcProject(tmp_path / "data", "../remote")
    data.commit("left", "v1")
    data.run("git", "commit", "--quiet", "--allow-empty", "--message=Only code")
    data.run("git", "tag", "code")
    monkeypatch.chdir(data.root)
    md5 = data.run("git", "show", "code:data/scans.dvc").split("md5: ")[1].split()[0]
    register(project, b"one", FIRST.model_copy(update={"rev": "", "md5": md5}))
    register(project, b"two", FIRST.model_copy(update={"rev": "code"}))
    assert versions(project, "code") == versions(project, "v1") == ["1"]
