"""Register, judge, promote and roll back against a real MLflow store on SQLite, with a bundle of a few tiny files."""

import json
import re
import urllib.error
import urllib.request
from typing import Any

import pytest
from project import Project

from vismem.cli import main
from vismem.errors import UserError
from vismem.provenance import write_manifest
from vismem.registry import listing, release
from vismem.registry.server import mlflow_server, model_page
from vismem.registry.tracking import Store, experiment_id, find_version, open_store, versions


def test_a_registered_bundle_is_a_challenger_with_run_files_lineage_and_verdict(project: Project) -> None:
    project.build(b"one")
    made = project.run("register")
    assert (made["name"], made["version"], made["passed"]) == ("vismem", "1", True)
    store = project.store
    version = find_version(store, "challenger")
    assert version is not None
    assert (version.version, version.run_id, version.model_id) == ("1", made["run_id"], made["model_id"])
    assert made["model_id"].startswith("m-")
    assert {key: version.tags[key] for key in ("git_commit", "data_sha256", "manifest_sha256", "score", "verdict")} == {
        "git_commit": "c0ffee",
        "data_sha256": "da7a",
        "manifest_sha256": made["manifest_sha256"],
        "score": "66.0000",
        "verdict": "passed",
    }
    run = store.client.get_run(made["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["gain/overall/delta"] == 6.0
    assert run.data.metrics["arms/vanilla/overall"] == 60.0
    curve = store.client.get_metric_history(made["run_id"], "stage1/reward")
    assert [(point.step, point.value) for point in curve] == [(0, 0.25), (1, 0.5)]
    assert run.data.params["gate.min_gain"] == str(project.config.gate.min_gain)
    files = {item.path for folder in ("", "evaluate", "validate") for item in _list(store, made["run_id"], folder)}
    assert {"verdict.json", "evaluate/report.html", "evaluate/plots", "validate/report.html"} <= files
    assert "evaluate/predictions" not in files
    kept = project.artifacts.parent / "mlartifacts" / "models" / made["model_id"] / "artifacts" / "bundle"
    assert (kept / "vismem" / "memory.safetensors").read_bytes() == b"one"


def _list(store: Store, run_id: str, folder: str) -> list[Any]:
    return list(store.client.list_artifacts(run_id, folder or None))


def test_the_same_bundle_registered_twice_keeps_its_version(project: Project) -> None:
    project.build(b"one")
    first, second = project.run("register"), project.run("register")
    assert second["version"] == first["version"] == "1"
    assert second["run_id"] == first["run_id"]
    assert len(versions(project.store)) == 1


def test_a_version_from_before_hashes_were_kept_is_registered_anew(project: Project) -> None:
    project.build(b"one")
    project.run("register")
    project.store.client.delete_model_version_tag("vismem", "1", "metrics_json_sha256")
    with pytest.raises(UserError, match="its sha256 is not the version's tag"):
        project.run("promote")
    assert project.run("register")["version"] == "2"
    assert project.run("promote")["promoted"]
    project.store.client.delete_model_version_tag("vismem", "2", "profile_json_sha256")  # before requests were compared
    assert project.run("register")["version"] == "3"


def test_a_better_second_champion_replaces_the_first_and_rollback_brings_it_back(project: Project) -> None:
    assert project.release(b"one", score=66.0)["promoted"]
    assert project.champion() == "1"
    second = project.release(b"two", score=68.0)
    assert (second["promoted"], second["version"], second["previous"]) == (True, "2", "1")
    assert project.champion() == "2"
    assert "version 1" in release.rollback(project.config)
    assert project.champion() == "1"
    with pytest.raises(UserError, match="no earlier champion"):
        release.rollback(project.config)
    assert project.moves == [("promote", "1", None), ("promote", "2", "1"), ("rollback", "1", "2")]


def test_rollback_repeated_goes_further_back_along_the_promotions(project: Project) -> None:
    for number, score in enumerate((66.0, 68.0, 70.0)):
        project.release(bytes([number]), score)
    champions = [project.champion()]
    for _ in range(2):
        release.rollback(project.config)
        champions.append(project.champion())
    assert champions == ["3", "2", "1"]


def test_a_refused_challenger_leaves_the_champion_and_says_why(project: Project) -> None:
    project.release(b"one", score=66.0)
    refused = project.release(b"two", score=65.0, gain=0.5)
    assert refused["promoted"] is False
    assert refused["version"] == "2"
    assert len(refused["reasons"]) == 3  # gain, its interval, the champion
    assert any("champion version 1 66.00" in reason for reason in refused["reasons"])
    assert "version 1 stays champion" in refused["line"]
    assert project.champion() == "1"
    version = find_version(project.store, "challenger")
    assert version is not None
    assert version.tags["verdict"] == "refused"
    assert version.tags["verdict.gain"].startswith("broken: the overall gain over vanilla is +0.50")


def test_promoting_the_champion_again_changes_nothing(project: Project) -> None:
    project.release(b"one", score=66.0)
    again = project.release(b"one", score=66.0)
    assert again["promoted"]
    assert project.champion() == "1"
    assert project.moves == [("promote", "1", None)]


def test_a_deleted_champion_is_not_silently_forgotten_by_rollback(project: Project) -> None:
    project.release(b"one", score=66.0)
    project.release(b"two", score=68.0)
    project.store.client.delete_model_version("vismem", "2")
    assert project.champion() is None
    assert "instead of version 2" in release.rollback(project.config)
    assert project.champion() == "1"
    project.store.client.delete_model_version("vismem", "1")
    with pytest.raises(UserError, match="no earlier champion"):  # not the one that was just rolled back from
        release.rollback(project.config)


@pytest.mark.parametrize("damage", ["changed", "missing", "unlisted"])
def test_a_damaged_bundle_is_refused_before_anything_is_written(project: Project, damage: str) -> None:
    project.build(b"one")
    weights = project.steps["export"] / "vismem" / "memory.safetensors"
    if damage == "changed":
        weights.write_bytes(b"onE")
    elif damage == "missing":
        weights.unlink()
    else:
        (weights.parent / "extra.bin").write_bytes(b"?")
    with pytest.raises(UserError, match=r"damaged.*vismem/(memory\.safetensors|extra\.bin)"):
        project.run("register")
    assert versions(project.store) == []
    assert project.store.client.get_experiment_by_name("vismem") is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("no hash in either", "stage2_sha256: Field required"),
        ("no hash in the bundle", "scores of another model"),
        ("another model", "scores of another model"),
        ("other test data", "scores on other test data"),
        ("one arm", "no arm vanilla"),
        ("no parity", r"parity\.json is damaged .*passed: Field required"),
    ],
)
def test_what_does_not_belong_together_or_lacks_a_field_is_refused(project: Project, changed: str, said: str) -> None:
    project.build(b"one", **({"test_sha256": "bbb"} if changed == "other test data" else {}))
    bundle, file = project.steps["export"], project.steps["evaluate"] / "metrics.json"
    metrics = json.loads(file.read_text())
    if changed == "no hash in either":
        del metrics["stage2_sha256"]
    if changed.startswith("no hash"):
        (bundle / "lineage.json").write_text('{"inputs_sha256": {}}')
    if changed == "another model":
        metrics["stage2_sha256"] = "bbb"
    if changed == "one arm":
        del metrics["arms"]["vanilla"]
    if changed == "no parity":
        (bundle / "parity.json").write_text("{}")
    file.write_text(json.dumps(metrics))
    write_manifest(bundle)
    with pytest.raises(UserError, match=said):
        project.run("register")
    assert versions(project.store) == []


def test_a_champion_without_a_usable_score_does_not_refuse_every_successor(project: Project) -> None:
    client = project.store.client
    for number, (tag, value) in enumerate((("score", "nan"), ("n", "many"), ("score", None)), start=1):
        made = project.release(bytes([number]), score=66.0)
        assert made["promoted"]
        assert project.champion() == str(number)
        client.delete_model_version_tag("vismem", str(number), "metrics_json_sha256")  # as of one from before
        if value is None:
            client.delete_model_version_tag("vismem", str(number), tag)
        else:
            client.set_model_version_tag("vismem", str(number), tag, value)
    made = project.release(b"last", score=61.0)
    assert made["promoted"]
    assert "champion version 3 has no usable score" in made["reasons"][-1]
    assert not project.release(b"worse", score=60.5)["promoted"]


def test_a_bundle_registered_again_keeps_the_figures_of_then(project: Project) -> None:
    project.build(b"one", score=66.0)
    project.run("register")
    project.build(b"one", score=66.0, n=100)
    assert project.run("register")["passed"]
    (project.steps["export"] / "extra").write_text("another bundle")
    write_manifest(project.steps["export"])
    again = project.run("register")
    assert (again["version"], again["passed"]) == ("2", False)
    assert "the scores are of 100 test items" in again["rules"][0]["reason"]


def test_promote_refuses_a_version_that_the_store_does_not_hold_as_registered(project: Project) -> None:
    project.build(b"one")
    project.run("register")
    project.store.client.delete_model_version("vismem", "1")
    with pytest.raises(UserError, match="run `vismem register` again"):
        project.run("promote")


def test_the_command_line_lists_shows_and_rolls_back(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    params = project.artifacts.parent / "params.yaml"
    params.write_text(json.dumps({"registry": {"tracking_uri": project.config.registry.tracking_uri}}))
    assert main(["models", "rollback", "--params", str(params)]) == 1
    assert "no earlier champion of 'vismem'" in capsys.readouterr().err
    project.release(b"one", score=66.0)
    project.release(b"two", score=68.0)
    assert main(["models", "--params", str(params)]) == 0
    assert "champion, challenger" in capsys.readouterr().out
    assert main(["models", "rollback", "--params", str(params)]) == 0
    assert "version 1 is champion again" in capsys.readouterr().out
    assert main(["models", "show", "--params", str(params)]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "1"
    assert main(["models", "promote", "--params", str(params)]) == 0
    assert "version 2 is refused, version 1 stays champion: version 2 was rolled back from" in capsys.readouterr().out
    assert main(["models", "promote", "2", "--unblock", "--params", str(params)]) == 0
    assert "version 2 is champion" in capsys.readouterr().out
    assert main(["models", "compare", "1", "2", "--params", str(params)]) == 0
    said = capsys.readouterr().out
    assert "both were scored on the same 600 items" in said
    assert re.search(r"overall\W+66\.000\W+68\.000\W+\+2\.000", said)
    assert main(["models", "rollback", "2", "--params", str(params)]) == 1
    assert "`vismem models rollback` takes no VERSION" in capsys.readouterr().err


def test_the_environment_s_store_wins_over_the_parameter(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    other = project.artifacts.parent / "other" / "store.db"
    other.parent.mkdir()
    other.write_bytes((project.artifacts.parent / "mlflow.db").read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    project.release(b"one", score=66.0)
    assert (other.parent / "mlartifacts").is_dir()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert project.champion() is None


def test_a_store_that_does_not_answer_is_one_plain_error(project: Project) -> None:
    nowhere = project.config.registry.model_copy(update={"tracking_uri": str(project.artifacts / "mlruns")})
    with pytest.raises(UserError, match=r"registry\.tracking_uri"):
        open_store(nowhere)


def test_the_ui_answers_on_its_page_and_is_gone_afterwards(project: Project) -> None:
    project.build(b"one")
    project.run("register")
    with mlflow_server(project.config, 0, project.artifacts / "log") as (address, server):
        assert model_page(project.config, address) == f"{address}/#/models/vismem"
        url = f"{address}/api/2.0/mlflow/registered-models/get?name=vismem"
        with urllib.request.urlopen(url, timeout=30) as reply:
            assert json.load(reply)["registered_model"]["latest_versions"][0]["version"] == "1"
        remote = project.config.registry.model_copy(update={"tracking_uri": address})
        assert listing.read_registry(remote) == listing.read_registry(project.config.registry)
    assert server.process.poll() is not None
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)


def test_what_mlflow_refuses_in_the_midst_is_one_plain_error_and_a_failed_run(project: Project) -> None:
    project.build(b"one")
    registry = project.config.registry.model_copy(update={"model_name": "no/slash"})
    project.config = project.config.model_copy(update={"registry": registry})
    with pytest.raises(UserError, match=r"MLflow: .*no/slash"):
        project.run("register")
    client = project.store.client
    (run,) = client.search_runs([client.get_experiment_by_name("vismem").experiment_id])
    assert run.info.status == "FAILED"


def test_of_two_that_make_the_experiment_at_once_the_slower_takes_what_the_other_made(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, slower = project.store.client, open_store(project.config.registry)
    seen = [None]  # by the slower, before the other has made it

    def get(name: str) -> Any:
        return seen.pop() if seen else client.get_experiment_by_name(name)

    monkeypatch.setattr(slower.client, "get_experiment_by_name", get)
    made = experiment_id(project.store)
    assert experiment_id(slower) == made
    assert [one.name for one in client.search_experiments()].count("vismem") == 1
