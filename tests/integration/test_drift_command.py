"""`vismem drift` beside a registered version: what it says, writes and ends with."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_project import DvcProject
from prepared import encoded, good, run, shards
from project import PROFILE, Project, answered

from vismem.cli import main
from vismem.config import DvcPath, Severity
from vismem.data.dvc_source import find
from vismem.data.fingerprint import examine_image
from vismem.data.profile import Profile
from vismem.data.revisions import write_revisions
from vismem.errors import UserError
from vismem.evaluation.predictions import predictions_file, write_predictions
from vismem.files import read_json
from vismem.provenance import write_manifest
from vismem.registry import inspect
from vismem.validation.drift import FACTS, drift

ROOT = Path(__file__).parents[2]
MANY = 2_000


def trained(project: Project, **changed: Any) -> None:
    """A released version, trained on questions of nine characters about grey images, evaluated by many answers."""
    alike = {name: {value: MANY for value in counts} for name, counts in PROFILE.model_dump().items() if counts and
             isinstance(counts, dict)}  # fmt: skip
    Profile(**PROFILE.model_dump() | alike | changed).write(project.steps["validate"])
    project.build(b"one")
    write_predictions([answered("two")] * MANY, predictions_file(project.steps["evaluate"], "vismem"))
    project.run("register")
    assert project.run("promote")["promoted"] is True


def log(project: Project, folder: Path, n: int = MANY, question: str = "how many?", **changed: Any) -> Path:
    """Requests like the training data's, answered by the champion as it answered its evaluation, but for `changed`."""
    manifest = inspect.trained(project.config, "champion").manifest_sha256
    line = {
        "format": 1, "time": datetime.now(UTC).isoformat(), "version": "1", "manifest_sha256": manifest,
        "memory": "learned", "max_new_tokens": 120, "temperature": 0.0, "answer": "two", "seconds": 0.1,
        "finish": "stop", "prompt_tokens": 40, "tokens": 2, "memories": {"short": 1}, "question": question, **changed,
    }  # fmt: skip
    image = {"width": 84, "height": 84, "look": "c8" * 192}
    lines = [line | {"request": f"{n}", "images": [image | {"sha256": f"{n}"}]} for n in range(n)]
    folder.mkdir(parents=True)
    (folder / "requests-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def found(project: Project, folder: Path, **settings: Any) -> tuple[str, bool, dict[str, str]]:
    """The line, whether an error broke, and the messages of the broken rules."""
    config = project.config.drift.model_copy(update=settings)
    out = project.artifacts / "drift"
    line, differs = drift(config, inspect.trained(project.config, "champion"), folder, 7, out)
    rules = read_json(out / "drift.json")["rules"]
    return line, differs, {rule["name"]: rule["message"] for rule in rules if not rule["success"]}


def test_requests_as_in_training_differ_in_nothing(project: Project, tmp_path: Path) -> None:
    trained(project)
    line, differs, broken = found(project, log(project, tmp_path / "log"))
    assert (line, differs, broken) == (
        "2,000 requests of the last 7 days, beside the data of version 1: no drift", False, {},
    )  # fmt: skip
    report = (project.artifacts / "drift" / "report.html").read_text()
    assert "No drift was found." in report
    assert all(name in report for name in FACTS)
    assert (project.artifacts / "drift" / "gx" / "expectations" / "requests.json").is_file()


def test_each_difference_is_a_finding_with_its_figures_and_a_severity_from_the_parameters(
    project: Project, tmp_path: Path
) -> None:
    trained(project)
    folder = log(project, tmp_path / "log", question="how many cups?", tokens=9, memories={})
    line, differs, broken = found(project, folder)
    assert differs is True
    assert list(broken) == ["question_length", "unseen_words", "answer_length", "memories"]
    assert broken["answer_length"] == (
        "length of the answers, beside evaluation's: mean 9.00 tokens, and 2.00 before "
        "(distance 100.0%, p < 0.001, 2,000 beside 2,000)"
    )
    assert "\n  - error memories: memories invoked per answer, beside evaluation's: mean 0.00, and 1.00" in line
    assert "The requests differ: question length" in (project.artifacts / "drift" / "report.html").read_text()
    severities = dict.fromkeys(broken, Severity.WARNING)
    line, differs, again = found(project, folder, severities=severities)
    assert (differs, again) == (False, broken)
    assert "- warning memories" in line
    with pytest.raises(UserError, match=r"drift\.severities: no rule 'memory' \(did you mean 'memories'\?\)"):
        found(project, folder, severities={"memory": Severity.WARNING})
    with pytest.raises(UserError, match=r"drift\.severities\.memories: it judges no single row"):
        found(project, folder, severities={"memories": Severity.QUARANTINE})


def test_too_few_requests_and_damaged_lines_are_warnings(project: Project, tmp_path: Path) -> None:
    trained(project)
    folder = log(project, tmp_path / "log", n=40)
    with (folder / "requests-2.jsonl").open("w") as file:
        file.write("{\n")
    _, differs, broken = found(project, folder)
    assert differs is False
    assert broken == {
        "enough_requests": f"too few to tell: {', '.join(FACTS)}",
        "lines_readable": "2.4% of the lines are damaged",
    }


def test_a_champion_that_is_older_than_the_data_is_named(project: Project, tmp_path: Path) -> None:
    trained(project)
    folder = log(project, tmp_path / "log")
    project.build(b"two", score=50.0)  # the gate refuses it
    lineage = project.steps["export"] / "lineage.json"
    lineage.write_text(lineage.read_text().replace("da7a", "new"))
    write_manifest(project.steps["export"])
    project.run("register")
    assert project.run("promote")["promoted"] is False
    _, differs, broken = found(project, folder)
    assert differs is True
    assert broken == {"champion_current": "version 2 is newer, and was trained on other data"}


def test_a_champion_whose_data_has_moved_on_is_older_than_it(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    source = DvcProject(tmp_path / "questions", "../remote")
    fixed = source.commit("left", "v1").strip()
    kept = find(DvcPath(repo=str(source.root), rev="main", path=Path("data/scans")))
    kept = kept.model_copy(update={"repo": str(source.root), "rev": ""})  # as of a project's own, cloned from there
    never_moves = kept.model_copy(update={"repo": "gone", "rev": fixed, "path": "data/other"})
    write_revisions(project.steps["validate"], [kept, never_moves])
    trained(project)
    folder = log(project, tmp_path / "log")
    assert found(project, folder)[1:] == (False, {})

    commit = source.commit("right", "v2").strip()
    now = find(DvcPath(repo=str(source.root), rev="main", path=Path("data/scans"))).md5
    moved = f"data/scans of {source.root} is {now} since commit {commit[:12]}, and version 1 was trained on {kept.md5}"
    assert found(project, folder)[1:] == (True, {"champion_current": moved})

    source.root.rename(tmp_path / "elsewhere")
    _, differs, broken = found(project, folder)
    assert (differs, list(broken)) == (False, ["data_known"])
    assert broken["data_known"].startswith(f"data/scans at HEAD of {source.root}: ")


def test_the_command_ends_with_status_3_where_requests_differ(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(project)
    monkeypatch.chdir(tmp_path)
    log(project, tmp_path / "same")
    log(project, tmp_path / "other", tokens=9)
    assert main(["drift", "--request-log", "same"]) == 0
    assert "no drift\nThe report is artifacts/drift/report.html" in capsys.readouterr().out
    assert main(["drift", "--request-log", "other"]) == 3
    assert "- error answer_length: " in capsys.readouterr().out
    assert main(["drift", "--request-log", "none"]) == 1
    assert "no folder" in capsys.readouterr().err


def test_a_registered_profile_that_was_edited_or_lost_is_found_out(project: Project) -> None:
    trained(project)
    version = project.store.client.get_model_version("vismem", "1")
    place = Path(project.store.client.get_run(version.run_id).info.artifact_uri.removeprefix("file://"))
    (place / "validate" / "profile.json").write_text("{}")
    with pytest.raises(UserError, match=r"whole validate/profile\.json of vismem version 1 .*sha256"):
        inspect.trained(project.config, "champion")
    shutil.rmtree(place / "validate")
    with pytest.raises(UserError, match=r"whole validate/profile\.json of vismem version 1"):
        inspect.trained(project.config, "1")


def test_validate_writes_what_its_clean_training_rows_look_like(tmp_path: Path) -> None:
    rows = [good("train", number) for number in range(6)]
    rows[1] = dataclasses.replace(rows[1], images=(encoded(1, (40, 60)),), question="Which of them, anyway?")
    rows += [dataclasses.replace(rows[0], id="again"), dataclasses.replace(rows[0], id="bad", answer=" ", choices=())]
    rows += [dataclasses.replace(good("train", 7), images=()), good("train", 8)]
    rows[-1] = dataclasses.replace(rows[-1], images=(encoded(8, (300, 32)),))
    shards(tmp_path, train=rows)
    warnings = dict.fromkeys(("images_present", "image_max_side"), Severity.WARNING)
    run(tmp_path, max_quarantined=1.0, max_pixels=200, severities=warnings)
    profile = Profile.read(tmp_path / "validate")
    assert profile.question_length == {6: 6, 22: 1}
    assert profile.image_min_side == {32: 6, 40: 1}
    assert profile.image_max_side == {32: 5, 60: 1, 300: 1}
    assert profile.words == ("anyway", "of", "them", "which")
    assert profile.unseen_words == {0: 6, 1: 1}
    assert profile.repeats == {1: 6, 2: 1}
    means = [round(sum(look) / len(look)) for look in (examine_image(row.images[0]).look for row in rows[:6])]
    assert sorted(means) == [value for value, count in profile.brightness.items() for _ in range(count)]


def test_the_command_of_the_cluster_s_job_runs_as_it_stands(project: Project, tmp_path: Path) -> None:
    trained(project)
    folder, work = log(project, tmp_path / "log", tokens=9), tmp_path / "tmp"
    work.mkdir()
    file = ROOT / "deploy" / "kubernetes" / "components" / "requests" / "drift.yaml"
    (job,) = [manifest for manifest in yaml.safe_load_all(file.read_text()) if manifest["kind"] == "CronJob"]
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    command = [part.replace("/requests/log", str(folder)) for part in container["command"]]
    store = f"sqlite:///{project.store.database}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = os.environ | {"PATH": path, "HOME": str(work), "MLFLOW_TRACKING_URI": store, "VISMEM_PROFILE": ""}
    done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert "- error answer_length: " in done.stdout
    variables["VISMEM_PROFILE"] = "smoke"  # its versions have a name of their own
    done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "of 'vismem-smoke'" in done.stderr
