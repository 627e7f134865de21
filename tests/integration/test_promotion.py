"""Promotion and rollback are transactions on the ledger: a kill before any call, a full disk, edited files."""

import itertools
import json
import math
import os
import resource
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from project import Project, scores
from races import PROCESSES

from vismem.config import Config
from vismem.errors import UserError
from vismem.records import Release
from vismem.registry import release
from vismem.registry.champion import mend_view
from vismem.registry.tracking import find_version, versions

UNLIMITED = resource.getrlimit(resource.RLIMIT_FSIZE)
BEATEN = "this version scores 68.00, champion version 1 66.00: +2.00 points; more than +0.00 is required"


class Killed(BaseException):
    """Where the process ends."""


def kill() -> None:
    raise Killed


def fill_disk() -> None:
    """No file may grow any more: SQLite can still read."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, UNLIMITED[1]))


class Mortal:
    """A client of MLflow that `fault` befalls before its call number `last`, counted from 0."""

    def __init__(self, client: Any, last: int, fault: Callable[[], None]) -> None:
        self.client, self.left, self.fault = client, last, fault

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            if self.left == 0:
                self.fault()
            self.left -= 1
            return getattr(self.client, name)(*given, **named)

        return call


def check_view(project: Project) -> str | None:
    """The ledger's champion, once MLflow says the same of champion and blocked versions."""
    ledger = mend_view(project.store)
    assert project.champion() == ledger.champion
    assert {v.version: v.tags["blocked"] for v in versions(project.store) if "blocked" in v.tags} == ledger.blocked
    return ledger.champion


def test_a_version_is_judged_by_the_gate_that_it_was_registered_with(project: Project) -> None:
    project.build(b"one", score=66.0, gain=6.0)
    project.run("register")
    stricter = project.config.gate.model_copy(update={"min_gain": 7.0})
    project.config = project.config.model_copy(update={"gate": stricter})
    assert project.run("promote")["promoted"]
    assert not project.release(b"two", score=68.0, gain=6.5)["promoted"]


@pytest.mark.parametrize(("action", "fault"), [("promote", kill), ("rollback", kill), ("promote", fill_disk)])
def test_after_a_kill_or_a_full_disk_at_any_call_ledger_and_view_agree_again_and_the_work_can_be_finished(
    project: Project, monkeypatch: pytest.MonkeyPatch, action: str, fault: Callable[[], None]
) -> None:
    project.release(b"one", score=66.0)
    if action == "rollback":
        project.release(b"two", score=68.0)
    else:
        project.build(b"two", score=68.0)
        project.run("register")
    database = project.store.database
    with closing(sqlite3.connect(database)) as store, closing(sqlite3.connect(":memory:")) as saved:
        store.backup(saved)
        for last in itertools.count():
            saved.backup(store)
            with monkeypatch.context() as patch:
                mortal = replace(project.store, client=Mortal(project.store.client, last, fault))
                for opened in ("open_store", "existing_store"):
                    patch.setattr(release, opened, lambda _, mortal=mortal: mortal)
                try:
                    project.run("promote") if action == "promote" else release.rollback(project.config)
                except (Killed, UserError, OSError):
                    pass
                else:
                    break
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)
            if action == "promote":
                assert check_view(project) in ("1", "2")
                made = project.run("promote")
                assert (made["promoted"], made["previous"], made["reasons"][-1]) == (True, "1", BEATEN)
                (version,) = (version for version in versions(project.store) if version.version == "2")
                assert version.tags["verdict.champion"] == f"passed: {BEATEN}"
            elif check_view(project) == "2":
                release.rollback(project.config)
            assert check_view(project) == {"promote": "2", "rollback": "1"}[action]
            assert project.moves[1:] == [("promote", "2", "1"), ("rollback", "1", "2")][: 1 + (action == "rollback")]
    assert last > 10, "the calls of the client were counted"


def killed_promoter(config: Config, registered: Path, out: Path, place: str) -> None:
    """Dies at the first call of `place`; "after" that method, or before it."""
    when, method = place.split()
    owner: Any = Release if method == "write" else MlflowClient
    original = getattr(owner, method)

    def die(*arguments: Any, **named: Any) -> None:
        if when == "after":
            original(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, method, die)
    release.promote(config, {"register": registered}, out)


@pytest.mark.parametrize("place", ["after create_model_version", "before set_registered_model_alias", "before write"])
def test_a_killed_process_leaves_no_lock_and_its_promotion_run_again_equals_the_unbroken_one(
    project: Project, place: str
) -> None:
    project.release(b"one", score=66.0)
    project.build(b"two", score=68.0)
    project.run("register")
    registered, out = project.artifacts / "register", project.artifacts / "promote"
    racer = PROCESSES.Process(target=killed_promoter, args=(project.config, registered, out, place))
    racer.start()
    racer.join()
    assert racer.exitcode == -signal.SIGKILL
    made = project.run("promote")
    assert (made["promoted"], made["version"], made["previous"]) == (True, "2", "1")
    assert made["reasons"][-1] == BEATEN
    assert check_view(project) == "2"
    assert project.moves == [("promote", "1", None), ("promote", "2", "1")]
    assert {path.name for path in out.iterdir()} == {"release.json", "verdict.json"}


def test_a_version_is_judged_by_the_registry_and_not_by_files_that_anyone_can_edit(project: Project) -> None:
    project.release(b"one", score=66.0)
    project.build(b"two", score=60.0, gain=0.5)
    project.run("register")
    verdict = project.artifacts / "register" / "verdict.json"
    passed = json.loads(verdict.read_text())
    passed["passed"] = True
    passed["rules"] = [{**rule, "passed": True} for rule in passed["rules"]]
    verdict.write_text(json.dumps(passed))
    project.build(b"two", score=99.0)  # what evaluate wrote is no longer asked either
    made = project.run("promote")
    assert (made["promoted"], project.champion()) == (False, "1")
    assert any("scores 60.00" in reason for reason in made["reasons"])


def test_a_version_whose_champion_has_changed_is_judged_against_the_present_one(project: Project) -> None:
    project.build(b"one", score=66.0)
    assert project.run("register", "late")["passed"]
    assert project.release(b"two", score=70.0)["promoted"]
    overtaken = project.run("promote", "late")
    assert (overtaken["promoted"], project.champion()) == (False, "2")
    assert "champion version 2 70.00" in overtaken["reasons"][0]
    project.build(b"three", score=71.0)
    project.run("register", "late")
    assert project.run("promote", "late")["promoted"]


def edit(project: Project, run_id: str, name: str, text: str | None) -> None:
    """Replace a file of the version's run in the store, or remove it."""
    run = project.store.client.get_run(run_id).info.artifact_uri
    file = Path(run.removeprefix("file://")) / name
    file.unlink() if text is None else file.write_text(text)


def test_figures_edited_in_the_registry_are_found_out_by_the_hash_that_was_registered(project: Project) -> None:
    project.release(b"one", score=66.0)
    project.build(b"two", score=60.0)
    made = project.run("register")
    assert made["passed"] is False
    verdict = {**made, "passed": True, "rules": [{**rule, "passed": True} for rule in made["rules"]]}
    edit(project, made["run_id"], "verdict.json", json.dumps({key: verdict[key] for key in ("passed", "rules")}))
    assert project.run("promote")["promoted"] is False, "a verdict is not read but made"
    better = json.dumps(scores(99.0, test_sha256=project.test_sha256).model_dump(mode="json"))
    edit(project, made["run_id"], "evaluate/metrics.json", better)
    with pytest.raises(UserError, match=r"metrics\.json of vismem version 2 \(its sha256 is not the version's tag"):
        project.run("promote")
    assert check_view(project) == "1"


def test_a_champion_is_compared_by_its_registered_figures_and_not_by_its_tags(project: Project) -> None:
    project.build(b"one", score=66.0)
    run_id = project.run("register")["run_id"]
    project.run("promote")
    project.store.client.set_model_version_tag("vismem", "1", "score", "60.0000")
    refused = project.release(b"two", score=65.0)
    assert (refused["promoted"], project.champion()) == (False, "1")
    assert "champion version 1 66.00" in refused["reasons"][0]
    worse = json.dumps(scores(60.0, test_sha256=project.test_sha256).model_dump(mode="json"))
    edit(project, run_id, "evaluate/metrics.json", worse)
    with pytest.raises(UserError, match=r"metrics\.json of vismem version 1 \(its sha256 is not the version's tag"):
        project.run("promote")


def test_no_figure_that_is_not_finite_no_empty_test_and_no_other_data_is_promoted(project: Project) -> None:
    project.release(b"one", score=66.0)
    for changed, rule in (
        ({"score": math.nan}, "champion"),
        ({"score": math.inf}, "champion"),
        ({"gain": math.nan}, "gain"),
        ({"n": 0}, "items"),
        ({"items_sha256": "07e4"}, "champion"),
    ):
        made = project.release(str(changed).encode(), **({"score": 90.0} | changed))
        assert not made["promoted"]
        assert rule in [item["name"] for item in made["rules"] if not item["passed"]]
    assert project.moves == [("promote", "1", None)]


def test_a_version_that_was_rolled_back_from_is_promoted_again_only_by_hand(project: Project) -> None:
    project.release(b"one", score=66.0)
    project.release(b"two", score=68.0)
    release.rollback(project.config)
    refused = project.run("promote")
    assert (refused["promoted"], project.champion()) == (False, "1")
    assert refused["reasons"][0].startswith("version 2 was rolled back from at ")
    assert project.release(b"three", score=67.0)["promoted"]
    assert project.moves[2:] == [("rollback", "1", "2"), ("promote", "3", "1")]
    release.rollback(project.config)
    assert check_view(project) == "1"
    assert "is refused" in release.promote_version(project.config, "2")
    assert release.promote_version(project.config, "2", unblock=True) == "vismem version 2 is champion"
    assert check_view(project) == "2"
    assert "is refused" in release.promote_version(project.config, "3"), "that one is blocked as before"
    version = find_version(project.store, "2")
    assert version is not None
    assert "verdict.blocked" not in version.tags


def test_a_figure_that_the_registry_has_lost_is_a_fault_that_names_it(project: Project) -> None:
    project.build(b"one")
    made = project.run("register")
    run = project.store.client.get_run(made["run_id"]).info.artifact_uri
    file = Path(run.removeprefix("file://")) / "evaluate" / "metrics.json"
    values = json.loads(file.read_text())
    for text in (json.dumps({**values, "n": None}), json.dumps({k: v for k, v in values.items() if k != "n"}), None):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(UserError, match=r"whole evaluate/metrics\.json of vismem version 1.*vismem register"):
            project.run("promote")
    assert project.champion() is None
