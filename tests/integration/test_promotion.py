"""Promotion is one critical section per registry: races of real processes, kills, and a registry behind a server."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from project import Project

from vismem.config import Config
from vismem.errors import UserError
from vismem.records import Release
from vismem.registry import release
from vismem.registry.champion import open_place
from vismem.registry.server import mlflow_server
from vismem.registry.tracking import find_version, versions

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vismem.registry.release"])
ORDER = (3, 7, 1, 5, 0, 6, 2, 4)


def promoter(config: Config, registered: Path, out: Path, start: Any) -> None:
    out.mkdir(parents=True)
    start.wait()
    release.promote(config, {"register": registered}, out)


def race(project: Project, places: tuple[int, ...], first: float) -> dict[str, Release]:
    """Register a model per place, then promote all at once; return what each promoter wrote, by version."""
    start = PROCESSES.Barrier(len(places))
    racers, folders = [], []
    for place in places:
        project.build(f"{first}-{place}".encode(), score=first + place)
        registered, out = (project.artifacts / f"{name}-{first}-{place}" for name in ("register", "promote"))
        project.run("register", registered.name)
        folders.append(out)
        racers.append(PROCESSES.Process(target=promoter, args=(project.config, registered, out, start)))
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * len(racers), "a refusal is a result"
    return {made.version: made for made in map(Release.read, folders)}


def check_race(project: Project, made: dict[str, Release], best: float) -> None:
    """The best is champion, every move was upwards from the champion before, and losers name who beat them."""
    champion = find_version(project.store, "champion")
    assert champion is not None
    assert float(champion.tags["score"]) == best
    moves = open_place(project.store).read().moves
    assert [move.previous for move in moves] == [None, *(move.version for move in moves[:-1])]
    tags = {version.version: version.tags for version in versions(project.store)}
    beaten = [float(tags[move.version]["score"]) for move in moves]
    assert beaten == sorted(set(beaten))
    for version, result in made.items():
        assert result.promoted == (version in {move.version for move in moves})
        if not result.promoted:
            assert "champion version" in result.reasons[0]
            assert tags[version]["verdict"] == "refused"
            assert tags[version]["verdict.champion"] == f"broken: {result.reasons[0]}"


def test_of_promoters_that_race_on_one_database_the_best_is_champion(project: Project) -> None:
    for round_ in range(2):
        made = race(project, ORDER, first=66.0 + 8 * round_ / 2)
        assert len(made) == len(ORDER)
        check_race(project, made, best=66.0 + 8 * round_ / 2 + 7)


@pytest.fixture
def served(project: Project) -> Iterator[Project]:
    """The project with its registry behind a server."""
    with mlflow_server(project.config, 0) as (address, _):
        registry = project.config.registry.model_copy(update={"tracking_uri": address})
        project.config = project.config.model_copy(update={"registry": registry})
        yield project


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


PLACES = [
    f"{when} {method}"
    for method in ("update_model_version", "log_artifact", "set_registered_model_tag", "set_registered_model_alias")
    for when in ("before", "after")
]


@pytest.mark.parametrize("place", [*PLACES, "before write"])
def test_a_killed_promotion_run_again_equals_the_unbroken_one(project: Project, tmp_path: Path, place: str) -> None:
    project.release(b"one", score=66.0)
    project.build(b"two", score=68.0)
    project.run("register")
    registered, out = project.artifacts / "register", project.artifacts / "promote"
    racer = PROCESSES.Process(target=killed_promoter, args=(project.config, registered, out, place))
    racer.start()
    racer.join()
    assert racer.exitcode == -signal.SIGKILL
    made = project.run("promote")
    reason = "this version scores 68.00, champion version 1 66.00: +2.00 points; more than +0.00 is required"
    assert (made["promoted"], made["version"], made["previous"]) == (True, "2", "1")
    assert made["reasons"][-1] == reason
    assert project.champion() == "2"
    assert project.moves == [("promote", "1", None), ("promote", "2", "1")]
    version = find_version(project.store, "2")
    assert version is not None
    assert version.tags["verdict.champion"] == f"passed: {reason}"
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
