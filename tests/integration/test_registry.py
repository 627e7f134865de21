"""Register, gate, promote and roll back against a real MLflow store on SQLite, with a bundle of a few tiny files."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from vismem.cli import main
from vismem.config import Config, parse_config
from vismem.data.sample import Sample, write_shards
from vismem.errors import UserError
from vismem.provenance import write_manifest
from vismem.registry import release
from vismem.registry.register import register
from vismem.registry.tracking import Store, aliased, open_store, versions
from vismem.registry.ui import mlflow_server, model_page
from vismem.serving.publish import main as publish_command
from vismem.serving.publish import publish


class Project:
    """A project folder with outputs of export, evaluate and validate: tiny stand-ins for theirs, none for ours."""

    def __init__(self, root: Path) -> None:
        self.artifacts = root / "artifacts"
        self.config = parse_config({"registry": {"tracking_uri": f"sqlite:///{root / 'mlflow.db'}"}})
        self.steps = {name: self.artifacts / name for name in ("export", "evaluate", "validate")}
        write_shards([Sample("q1", (b"png",), "how many?", "two")], self.steps["validate"] / "data" / "test")
        _write(self.steps["validate"] / "validation.json", {"success": True, "rows": {"test": 1}, "rules": []})
        (self.steps["validate"] / "report.html").write_text("<p>data</p>")

    def build(self, weights: bytes, score: float = 66.0, gain: float = 6.0) -> None:
        """The outputs of evaluate and export for a model of that score."""
        interval = [gain - 2, gain + 2]
        arms = {
            "vanilla": {"overall": score - gain, "seconds_per_sample": 0.10},
            "vismem": {"overall": score, "seconds_per_sample": 0.12},
        }
        gains = {name: {"delta": gain, "ci95": interval, "p": 0.01} for name in ("overall", "understanding")}
        _write(self.steps["evaluate"] / "metrics.json", {"n": 600, "arms": arms, "gain": gains, "seed": 0})
        (self.steps["evaluate"] / "predictions").mkdir(exist_ok=True)
        (self.steps["evaluate"] / "predictions" / "vismem.parquet").write_bytes(b"rows")
        (self.steps["evaluate"] / "plots").mkdir(exist_ok=True)
        (self.steps["evaluate"] / "plots" / "scores.png").write_bytes(b"png")
        (self.steps["evaluate"] / "report.html").write_text("<p>scores</p>")
        bundle = self.steps["export"]
        (bundle / "training").mkdir(parents=True, exist_ok=True)
        (bundle / "training" / "stage1.csv").write_text("step,reward,kl\n0,0.25,\n1,0.5,0.01\n")
        _write(bundle / "parity.json", {"passed": True, "items": 4, "greedy_equal": 4, "max_memory_difference": 1e-6})
        _write(bundle / "lineage.json", {"git": {"commit": "c0ffee"}, "data_sha256": "da7a", "params": {"seed": 0}})
        (bundle / "vismem").mkdir(exist_ok=True)
        (bundle / "vismem" / "memory.safetensors").write_bytes(weights)
        write_manifest(bundle)

    def run(self, name: str) -> dict[str, Any]:
        """Run `register` or `promote`; return what it wrote, together."""
        out = self.artifacts / name
        out.mkdir(parents=True, exist_ok=True)
        inputs = {**self.steps, "register": self.artifacts / "register"}
        line = (register if name == "register" else release.promote)(self.config, inputs, out)
        written = {key: value for path in out.glob("*.json") for key, value in json.loads(path.read_text()).items()}
        return {"line": line, **written}

    def release(self, weights: bytes, score: float, gain: float = 6.0) -> dict[str, Any]:
        self.build(weights, score, gain)
        self.run("register")
        return self.run("promote")

    @property
    def store(self) -> Store:
        return open_store(self.config.registry)

    def champion(self) -> str | None:
        version = release.current_champion(self.config)
        return version.version if version else None


def _write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty store; making one takes seconds, copying it none."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(Config().registry.model_copy(update={"tracking_uri": f"sqlite:///{path}"}))
    return path


@pytest.fixture
def project(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    return Project(tmp_path)


def test_a_registered_bundle_is_a_challenger_with_run_files_lineage_and_verdict(project: Project) -> None:
    project.build(b"one")
    made = project.run("register")
    assert (made["name"], made["version"], made["passed"]) == ("vismem", "1", True)
    store = project.store
    version = aliased(store, "challenger")
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
    kept = project.artifacts.parent / "mlartifacts" / "models" / made["model_id"] / "artifacts"
    assert (kept / "vismem" / "memory.safetensors").read_bytes() == b"one"


def _list(store: Store, run_id: str, folder: str) -> list[Any]:
    return list(store.client.list_artifacts(run_id, folder or None))


def test_the_same_bundle_registered_twice_keeps_its_version(project: Project) -> None:
    project.build(b"one")
    first, second = project.run("register"), project.run("register")
    assert second["version"] == first["version"] == "1"
    assert second["run_id"] == first["run_id"]
    assert len(versions(project.store)) == 1


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
    moves = [(move.action, move.version, move.previous) for move in release.history(project.store)]
    assert moves == [("promote", "1", None), ("promote", "2", "1"), ("rollback", "1", "2")]


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
    version = aliased(project.store, "challenger")
    assert version is not None
    assert version.tags["verdict"] == "refused"
    assert version.tags["verdict.gain"].startswith("broken: the overall gain over vanilla is +0.50")


def test_a_verdict_that_another_champion_has_overtaken_promotes_nobody(project: Project) -> None:
    project.build(b"one", score=66.0)
    project.run("register")
    late = {name: (project.artifacts / "register" / name).read_text() for name in ("version.json", "verdict.json")}
    assert project.release(b"two", score=70.0)["promoted"]
    for name, text in late.items():
        (project.artifacts / "register" / name).write_text(text)
    overtaken = project.run("promote")
    assert (overtaken["promoted"], project.champion()) == (False, "2")
    assert "meanwhile version 2 has become champion" in overtaken["reasons"][0]


def test_promoting_the_champion_again_changes_nothing(project: Project) -> None:
    project.release(b"one", score=66.0)
    again = project.release(b"one", score=66.0)
    assert again["promoted"]
    assert project.champion() == "1"
    assert len(release.history(project.store)) == 1


def test_a_deleted_champion_is_not_silently_forgotten_by_rollback(project: Project) -> None:
    project.release(b"one", score=66.0)
    project.release(b"two", score=68.0)
    project.store.client.delete_model_version("vismem", "2")
    assert project.champion() is None
    assert "instead of a deleted version" in release.rollback(project.config)
    assert project.champion() == "1"


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


def test_promote_refuses_a_version_that_the_store_does_not_hold_as_registered(project: Project) -> None:
    project.build(b"one")
    project.run("register")
    project.store.client.delete_model_version("vismem", "1")
    with pytest.raises(UserError, match="run `vismem register` again"):
        project.run("promote")


def test_the_listing_and_a_version_s_page_name_aliases_and_history(project: Project) -> None:
    project.release(b"one", score=66.0)
    project.release(b"two", score=60.0)
    rows = release.models(project.config)
    assert [(row["version"], row["aliases"], row["verdict"]) for row in rows] == [
        ("2", "challenger", "refused"),
        ("1", "champion", "passed"),
    ]
    assert release.show(project.config, "champion")["version"] == "1"
    assert [move["action"] for move in release.show(project.config, "1")["history"]] == ["promote"]
    with pytest.raises(UserError, match="no version or alias '7'"):
        release.show(project.config, "7")


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


def served(folder: Path) -> dict[str, bytes]:
    """What the servers of a cluster would serve: the weights of each version in the current repository."""
    files = (folder / "current").glob("*/*/bundle/vismem/memory.safetensors")
    return {"/".join(path.relative_to(folder / "current").parts[:2]): path.read_bytes() for path in files}


def test_the_published_repository_is_the_champion_s_and_follows_it_back(project: Project, tmp_path: Path) -> None:
    models = tmp_path / "models"
    with pytest.raises(UserError, match="has no champion yet"):
        publish(project.config, models)
    assert not models.exists()
    project.release(b"one", score=66.0)
    assert publish(project.config, models).startswith("vismem version 1 is current in ")
    assert served(models) == {"vismem/1": b"one"}
    project.release(b"two", score=65.0, gain=0.5)  # refused
    assert publish(project.config, models) == "vismem version 1 is current already"
    project.release(b"three", score=68.0)
    publish(project.config, models)
    assert served(models) == {"vismem/3": b"three"}
    assert sorted(path.name for path in (models / "releases").iterdir()) == ["1", "3"]  # a running server reads on
    release.rollback(project.config)
    publish(project.config, models)
    assert served(models) == {"vismem/1": b"one"}


def test_a_published_link_holds_wherever_the_volume_is_mounted(project: Project, tmp_path: Path) -> None:
    project.release(b"one", score=66.0)
    publish(project.config, tmp_path / "models")
    assert served((tmp_path / "models").rename(tmp_path / "mounted")) == {"vismem/1": b"one"}


def test_a_bundle_damaged_in_the_store_is_not_published(project: Project, tmp_path: Path) -> None:
    project.release(b"one", score=66.0)
    publish(project.config, tmp_path / "models")
    made = project.release(b"two", score=68.0)
    kept = project.artifacts.parent / "mlartifacts" / "models" / made["model_id"] / "artifacts"
    (kept / "vismem" / "memory.safetensors").write_bytes(b"tw0")
    with pytest.raises(UserError, match=r"version 2 .* damaged: vismem/memory\.safetensors has changed"):
        publish(project.config, tmp_path / "models")
    write_manifest(kept)  # whoever can change the files can change their list, not what the registry says of it
    with pytest.raises(UserError, match=r"version 2 .* manifest\.json is another than was registered"):
        publish(project.config, tmp_path / "models")
    assert served(tmp_path / "models") == {"vismem/1": b"one"}


def test_publishing_goes_on_where_it_was_killed(project: Project, tmp_path: Path) -> None:
    project.release(b"one", score=66.0)
    half = tmp_path / "models" / "releases" / "1.partial"
    (half / "bundle").mkdir(parents=True)
    (half / "bundle" / "left").write_bytes(b"half")
    (tmp_path / "models" / "current.partial").symlink_to("nowhere")
    publish(project.config, tmp_path / "models")
    assert served(tmp_path / "models") == {"vismem/1": b"one"}
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["current", "releases"]


def test_the_publishing_command_says_what_it_did_or_why_not(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", project.config.registry.tracking_uri)
    assert publish_command(["--to", str(tmp_path / "models")]) == 1
    assert "has no champion yet" in capsys.readouterr().err
    project.release(b"one", score=66.0)
    assert publish_command(["--to", str(tmp_path / "models")]) == 0
    assert "vismem version 1 is current in" in capsys.readouterr().out
