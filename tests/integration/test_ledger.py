"""The ledger of champions in a registry on SQLite, by its file and behind MLflow's server.

VISMEM_RACES=100 runs that many races.
"""

import os
from contextlib import nullcontext
from typing import Any

import pytest
from project import Project
from races import Races

from vismem.errors import UserError
from vismem.registry import champion, listing, release
from vismem.registry.champion import append, read_ledger
from vismem.registry.ledger import Ledger, ledger_model
from vismem.registry.server import mlflow_server
from vismem.registry.tracking import find_version

RACES = int(os.environ.get("VISMEM_RACES", "5"))


@pytest.mark.parametrize("place", ["its file", "its server"])
def test_of_promoters_and_rollbacks_at_once_each_move_has_one_winner_and_each_process_hears_the_truth(
    project: Project, place: str
) -> None:
    races = Races(project)
    served = mlflow_server(project.config, 0) if place == "its server" else nullcontext()
    with served as server:
        if server:
            project.connect(server[0])
        for seed in range(RACES):
            races.run(seed)


def test_a_move_on_a_ledger_that_has_grown_is_not_made(project: Project) -> None:
    ours, theirs = project.store, project.store
    empty = read_ledger(ours)
    assert (empty.champion, empty.revision) == (None, 0)
    assert append(theirs, empty, first := empty.next_move("promote", "1"))
    assert not append(ours, empty, empty.next_move("promote", "2"))
    assert read_ledger(ours) == read_ledger(theirs) == Ledger(moves=(first,))
    assert append(ours, read_ledger(ours), read_ledger(ours).next_move("promote", "2"))
    assert project.moves == [("promote", "1", None), ("promote", "2", "1")]


def test_a_request_that_arrives_twice_makes_one_move_and_its_sender_hears_so(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a client repeats a request because the first answer was lost."""
    store, send = project.store, champion._write
    monkeypatch.setattr(champion, "_write", lambda *given: (send(*given), send(*given)))
    for version in ("1", "2"):
        ledger = read_ledger(store)
        assert append(store, ledger, ledger.next_move("promote", version))
    assert project.moves == [("promote", "1", None), ("promote", "2", "1")]


def test_an_alias_from_before_there_was_a_ledger_is_adopted(project: Project) -> None:
    project.build(b"one", score=66.0)
    project.run("register")
    project.store.client.set_registered_model_alias("vismem", "champion", "1")
    assert [row["aliases"] for row in listing.models(project.config)] == ["champion, challenger"]
    assert project.release(b"two", score=65.0)["promoted"] is False
    assert project.release(b"three", score=67.0)["previous"] == "1"
    assert project.moves == [("adopt", "1", None), ("promote", "3", "1")]


def test_an_entry_deleted_in_mlflow_is_named(project: Project) -> None:
    for number, score in enumerate((66.0, 68.0, 70.0)):
        project.release(bytes([number]), score)
    project.store.client.delete_model_version(ledger_model("vismem"), "2")
    with pytest.raises(UserError, match="has lost its entry 2"):
        release.rollback(project.config)


def test_a_promoter_behind_a_server_and_one_on_its_file_share_one_ledger(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share no lock: each is overtaken by the other between its judgement and its move."""
    judge, file = release.judge_version, project.config.registry.tracking_uri
    with mlflow_server(project.config, 0) as (address, _):
        for first, (slow, quick) in ((60.0, (file, address)), (70.0, (address, file))):
            for score, folder in ((first, "slow"), (first + 1, "quick")):
                project.build(f"{score}".encode(), score=score)
                project.run("register", folder)
            overtaken: list[str] = []

            def judge_slowly(*given: Any, slow: Any = slow, quick: Any = quick, overtaken: Any = overtaken) -> Any:
                verdict = judge(*given)
                if not overtaken:
                    overtaken.append("")
                    project.connect(quick)
                    assert project.run("promote", "quick")["promoted"]
                    project.connect(slow)
                return verdict

            monkeypatch.setattr(release, "judge_version", judge_slowly)
            project.connect(slow)
            made = project.run("promote", "slow")
            monkeypatch.setattr(release, "judge_version", judge)
            assert made["promoted"] is False
            assert f"{first + 1:.2f}" in made["reasons"][0]
            present = find_version(project.store, "champion")
            assert present is not None
            assert float(present.tags["score"]) == first + 1
            project.connect(file)
    assert len(project.moves) == 2
