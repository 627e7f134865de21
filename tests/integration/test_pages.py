"""What a person finds in MLflow of a version, what may be deleted there, and where a rollback is told to go."""

import json
import re

import mlflow
import pytest
from project import Project

from vismem.cli import main
from vismem.errors import UserError
from vismem.provenance import write_manifest
from vismem.registry import inspect, release
from vismem.registry.tracking import find_version, versions


def test_the_page_of_a_version_shows_verdict_reports_and_card_and_a_promotion_keeps_them(project: Project) -> None:
    made = project.release(b"one", score=66.0)
    client = project.store.client
    page = client.get_model_version("vismem", "1").description
    head, _, card = page.partition("\n\n---\n\n")
    assert head.startswith("VisMem 66.0000, +6.00 points over vanilla (n = 600). The gate passes it:\n\n- ✓ the scores")
    assert card == "# VisMem on a tiny model\n\nA card."
    version = find_version(project.store, "1")
    assert version is not None
    for link in re.findall(r"/artifacts/([^)]+)\)", head):
        assert link in {item.path for item in client.list_artifacts(version.run_id, link.rpartition("/")[0] or None)}
    (project.steps["export"] / "README.md").write_text("# A long card\n" + "a line of it\n" * 500)
    write_manifest(project.steps["export"])
    project.run("register")
    assert project.run("promote")["promoted"] is False
    page = client.get_model_version("vismem", "2").description
    assert len(page) <= 5000
    assert page.endswith("a line of it\n\nThe rest of the card: `bundle/README.md` of the version's files.")
    assert made["version"] == "1"


def test_answers_are_a_table_that_can_be_filtered_and_compared_between_versions(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.release(b"one", score=66.0)
    project.release(b"two", score=55.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", project.config.registry.tracking_uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "vismem")
    runs = {version.run_id: version.version for version in versions(project.store)}
    table = mlflow.load_table("evaluation.json", run_ids=list(runs), extra_columns=["run_id"])
    assert len(table) == 4
    ours = table[(table.arm == "vismem") & (table.benchmark == "scenes") & (table.task == "count")]
    assert {runs[row.run_id]: row.correct for row in ours.itertuples()} == {"1": True, "2": False}
    assert set(table.cluster) == {"c1"}
    assert (table.tokens.tolist(), table.memories.tolist()) == ([2] * 4, [1] * 4)


def test_scores_without_their_answers_are_not_registered(project: Project) -> None:
    project.build(b"one")
    (project.steps["evaluate"] / "predictions" / "vismem.parquet").unlink()
    with pytest.raises(UserError, match=r"no predictions .*vismem\.parquet: run `vismem evaluate` again"):
        project.run("register")
    assert versions(project.store) == []


def test_a_rollback_to_a_named_version_is_done_once_however_often_it_is_asked(project: Project) -> None:
    for number, score in enumerate((66.0, 68.0, 70.0)):
        project.release(bytes([number]), score)
    for _ in range(2):
        said = release.rollback(project.config, to="2")
        assert project.champion() == "2"
    assert said == "vismem version 2 is champion: nothing is to be rolled back"
    with pytest.raises(UserError, match="no earlier champion 3 of 'vismem' in"):
        release.rollback(project.config, to="3")
    release.rollback(project.config, to="1")
    assert project.moves[3:] == [("rollback", "2", "3"), ("rollback", "1", "2")]


def test_a_rollback_to_a_version_goes_past_those_between(project: Project) -> None:
    for number, score in enumerate((66.0, 68.0, 70.0)):
        project.release(bytes([number]), score)
    assert "version 1 is champion again, instead of version 3" in release.rollback(project.config, to="1")
    assert project.moves[3:] == [("rollback", "1", "3")]


def test_a_version_that_was_never_champion_can_be_deleted_and_no_other(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    params = project.artifacts.parent / "params.yaml"
    params.write_text(json.dumps({"registry": {"tracking_uri": project.config.registry.tracking_uri}}))

    def models(*arguments: str) -> str:
        status, told = main(["models", *arguments, "--params", str(params)]), capsys.readouterr()
        return told.out if status == 0 else told.err

    project.release(b"one", score=66.0)
    project.release(b"two", score=68.0)
    refused = project.release(b"three", score=65.0)
    assert "version 1 is champion again" in models("rollback", "--to", "1")
    for which in ("champion", "1", "2"):
        assert "is or was champion: it is kept" in models("delete", which)
    assert "name the version to delete" in models("delete")
    assert "version 3 is deleted" in models("delete", "challenger")
    assert [version.version for version in versions(project.store)] == ["2", "1"]
    with pytest.raises(mlflow.MlflowException, match="not found"):
        project.store.client.get_logged_model(refused["model_id"])


def test_verify_says_what_somebody_deleted_in_mlflow(project: Project) -> None:
    project.release(b"one", score=66.0)
    made = project.release(b"two", score=68.0)
    client = project.store.client
    assert inspect.verify(project.config, "champion").endswith("agree")
    client.delete_model_version("vismem", "1")
    assert inspect.verify(project.config, "champion").endswith("; of the champions before, deleted in MLflow: 1")
    with pytest.raises(UserError, match="version 1 of 'vismem' was champion, and somebody deleted it in MLflow"):
        inspect.verify(project.config, "1")
    run = next(version.run_id for version in versions(project.store))
    client.delete_run(run)
    with pytest.raises(UserError, match=f"its run is deleted, `mlflow runs restore --run-id {run}`"):
        inspect.verify(project.config, "2")
    client.restore_run(run)
    client.delete_model_version("vismem", made["version"])
    with pytest.raises(UserError, match="version 2 of 'vismem', the champion, is no longer in"):
        inspect.verify(project.config, "champion")
