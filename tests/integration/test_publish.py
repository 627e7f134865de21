"""What the servers of a cluster serve follows the champion, out of a real MLflow store on SQLite."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from project import Project

from vismem.config import resolve
from vismem.errors import UserError
from vismem.files import read_json, write_json
from vismem.locks import lock_folder
from vismem.provenance import file_hashes, sha256_file, write_manifest
from vismem.registry import release
from vismem.rollout import main as rollout_command
from vismem.serving import repository
from vismem.serving.champion import follower
from vismem.serving.command import PROFILE_VARIABLE
from vismem.serving.publish import publish
from vismem.serving.repository import write_model_repository


def served(repository: Path) -> dict[str, bytes]:
    """What a server of that repository would serve: the weights of each version."""
    files = repository.glob("*/*/bundle/vismem/memory.safetensors")
    return {"/".join(path.relative_to(repository).parts[:2]): path.read_bytes() for path in files}


def releases(models: Path) -> list[str]:
    """The versions whose releases lie on the volume."""
    return sorted(path.name.partition("-")[0] for path in (models / "releases").iterdir())


def test_the_published_repository_is_the_champion_s_and_follows_it_back(project: Project, tmp_path: Path) -> None:
    models = tmp_path / "models"
    with pytest.raises(UserError, match="has no champion yet"):
        publish(project.config, models)
    assert not models.exists()
    project.release(b"one", score=66.0)
    first = publish(project.config, models)
    assert (first.version, first.repository.parent) == ("1", models / "releases")
    assert served(first.repository) == {"vismem/1": b"one"}
    project.release(b"two", score=65.0, gain=0.5)  # refused
    assert publish(project.config, models) == first
    project.release(b"three", score=68.0)
    assert served(publish(project.config, models).repository) == {"vismem/3": b"three"}
    assert releases(models) == ["1", "3"], "a running server reads on"
    release.rollback(project.config)
    project.store.client.set_registered_model_alias("vismem", "champion", "3")  # the ledger is asked, not the alias
    assert publish(project.config, models) == first


def test_a_release_with_other_code_than_ours_is_written_anew_though_its_manifest_lists_it(
    project: Project, tmp_path: Path
) -> None:
    project.release(b"one", score=66.0)
    first = publish(project.config, tmp_path / "models")
    model, manifest = first.repository / "vismem", first.repository / "vismem" / "manifest.json"
    written = file_hashes(first.repository)
    with (model / "1" / "model.py").open("a") as code:
        code.write("import os")
    listed = read_json(manifest)
    write_json(manifest, listed | {"files": listed["files"] | {"1/model.py": sha256_file(model / "1" / "model.py")}})
    for _ in ("other code", "another model"):
        assert repository.repository_problems(first.repository) == []
        assert publish(project.config, tmp_path / "models") == first
        assert file_hashes(first.repository) == written
        (first.repository / "other").mkdir()
        write_manifest(first.repository / "other")


def test_two_jobs_do_not_fetch_into_one_folder(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.release(b"one", score=66.0)
    monkeypatch.setattr("vismem.serving.publish.PATIENCE", 0.0)
    with lock_folder(tmp_path / "models"), pytest.raises(UserError, match="is in use by process"):
        publish(project.config, tmp_path / "models")
    assert publish(project.config, tmp_path / "models").version == "1"


def test_vismem_serve_serves_the_ledger_s_champion_whatever_was_deployed_last(project: Project) -> None:
    deployed = project.artifacts / "deploy" / "model_repository"

    follow = follower(project.config, project.artifacts)

    def champion() -> Path:
        found = follower(project.config, project.artifacts)()
        assert follow() == found
        return found

    def serves() -> dict[str, bytes]:
        return served(champion())

    assert champion() == deployed, "to try out what was refused"
    project.release(b"one", score=66.0)
    write_model_repository(project.steps["export"], deployed, "vismem", 1)
    assert champion() == deployed, "no second copy"
    project.release(b"two", score=68.0)
    assert serves() == {"vismem/2": b"two"}
    release.rollback(project.config)
    project.store.client.set_registered_model_alias("vismem", "champion", "2")
    assert champion() == deployed
    shutil.rmtree(deployed)
    assert serves() == {"vismem/1": b"one"}
    assert project.champion() == "1"


def test_a_champion_that_is_followed_is_read_again_only_where_the_ledger_moved(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.release(b"one", score=66.0)
    follow, checked = follower(project.config, project.artifacts), list[Path]()
    monkeypatch.setattr("vismem.serving.publish.repository_problems", lambda folder: checked.append(folder) or [])
    first = follow()
    follow()
    follow()
    assert checked == []
    project.release(b"two", score=68.0)
    second = follow()
    follow()
    release.rollback(project.config)
    assert (follow(), follow()) == (first, first) != (second, second)
    assert checked == [first], "it was there from before"
    shutil.rmtree(first)
    assert served(follow()) == {"vismem/1": b"one"}


def test_a_champion_that_cannot_be_served_is_fetched_again_less_and_less_often(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.release(b"one", score=66.0)
    clock, fetched, follow = [0.0], list[float](), follower(project.config, project.artifacts)
    monkeypatch.setattr("vismem.serving.champion.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def download(*_: object) -> None:
        fetched.append(clock[0])
        raise UserError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("vismem.serving.publish.download_bundle", download)
        for _ in range(20):
            with pytest.raises(UserError, match="no room"):
                follow()
            clock[0] += 10
        assert fetched == [0, 10, 30, 70, 150]
        project.release(b"two", score=68.0)
        with pytest.raises(UserError, match="no room"):
            follow()
        assert fetched[-1] == clock[0], "another is tried at once"
    clock[0] += 10
    assert served(follow()) == {"vismem/2": b"two"}


def test_a_bundle_damaged_in_the_store_is_not_published(project: Project, tmp_path: Path) -> None:
    project.release(b"one", score=66.0)
    first = publish(project.config, tmp_path / "models")
    made = project.release(b"two", score=68.0)
    kept = project.artifacts.parent / "mlartifacts" / "models" / made["model_id"] / "artifacts" / "bundle"
    (kept / "vismem" / "memory.safetensors").write_bytes(b"tw0")
    with pytest.raises(UserError, match=r"version 2 .* damaged: vismem/memory\.safetensors has changed"):
        publish(project.config, tmp_path / "models")
    write_manifest(kept)  # whoever can change the files can change their list, not what the registry says of it
    with pytest.raises(UserError, match=r"version 2 .* manifest\.json is another than was registered"):
        publish(project.config, tmp_path / "models")
    assert [path for path in first.repository.parent.iterdir() if path.suffix != ".partial"] == [first.repository]


def test_publishing_goes_on_where_it_was_killed(project: Project, tmp_path: Path) -> None:
    project.release(b"one", score=66.0)
    half = tmp_path / "models" / "releases" / "0-c0de.partial"  # of whichever version
    (half / "bundle").mkdir(parents=True)
    (half / "bundle" / "left").write_bytes(b"half")
    published = publish(project.config, tmp_path / "models")
    assert served(published.repository) == {"vismem/1": b"one"}
    assert list(half.parent.iterdir()) == [published.repository]


def test_another_vismem_publishes_a_champion_with_its_own_code_and_leaves_what_servers_read(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.release(b"one", score=66.0)
    first = publish(project.config, tmp_path / "models")
    newer = tmp_path / "model.py"
    newer.write_bytes(repository.MODEL_SOURCE.read_bytes() + b"# newer")
    monkeypatch.setattr(repository, "MODEL_SOURCE", newer)
    second = publish(project.config, tmp_path / "models")
    assert (second.version, served(second.repository)) == ("1", {"vismem/1": b"one"})
    assert second.manifest != first.manifest
    assert (second.repository / "vismem" / "1" / "model.py").read_bytes() == newer.read_bytes()
    assert repository.repository_problems(first.repository) == []
    assert releases(tmp_path / "models") == ["1", "1"]
    assert publish(project.config, tmp_path / "models") == second


def test_a_number_that_names_another_bundle_after_a_restore_leaves_what_servers_read(
    project: Project, tmp_path: Path
) -> None:
    database = project.artifacts.parent / "mlflow.db"
    backup = database.read_bytes()
    project.release(b"one", score=66.0)
    first = publish(project.config, tmp_path / "models")
    database.write_bytes(backup)
    project.release(b"other", score=66.0)
    second = publish(project.config, tmp_path / "models")
    assert (first.version, served(first.repository)) == ("1", {"vismem/1": b"one"})
    assert (second.version, served(second.repository)) == ("1", {"vismem/1": b"other"})


def test_a_release_damaged_on_the_volume_is_fetched_again(project: Project, tmp_path: Path) -> None:
    project.release(b"one", score=66.0)
    published = publish(project.config, tmp_path / "models")
    (published.bundle / "vismem" / "memory.safetensors").unlink()
    (published.bundle / "vismem" / "memory.safetensors").write_bytes(b"0ne")
    assert publish(project.config, tmp_path / "models") == published
    assert served(published.repository) == {"vismem/1": b"one"}


def test_a_rollout_without_a_champion_says_so(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", project.config.registry.tracking_uri)
    command = ["--to", str(tmp_path / "models"), "--namespace", "mine"]
    assert rollout_command(command) == 1
    assert "'vismem' in " in capsys.readouterr().err
    profile = "qwen2_5_vl_7b"
    monkeypatch.setenv(PROFILE_VARIABLE, profile)  # as in a pod
    assert rollout_command(command) == 1
    assert f"'{resolve(profile).registry.model_name}' in " in capsys.readouterr().err


def test_a_volume_that_cannot_be_written_is_one_line_of_a_rollout(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.release(b"one", score=66.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", project.config.registry.tracking_uri)
    (tmp_path / "models").write_text("a file")
    assert rollout_command(["--to", str(tmp_path / "models"), "--namespace", "mine"]) == 1
    assert f"'{tmp_path / 'models'}" in capsys.readouterr().err


def test_the_profile_s_model_is_published_under_the_profile_s_name(project: Project, tmp_path: Path) -> None:
    wanted = resolve("qwen2_5_vl_7b")
    registry = project.config.registry.model_copy(update={"model_name": wanted.registry.model_name})
    project.config = project.config.model_copy(update={"registry": registry, "deploy": wanted.deploy})
    project.release(b"large", score=66.0)
    found = publish(project.config, tmp_path / "models")
    assert served(found.repository) == {f"{wanted.deploy.model_name}/1": b"large"}
