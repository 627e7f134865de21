"""The ledger of champions in a registry on SQLite, by its file and behind MLflow's server.

VISMEM_RACES=100 runs that many races.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from project import Project
from races import Races

from vismem.errors import UserError
from vismem.registry import champion, listing, release
from vismem.registry.champion import append, read_ledger
from vismem.registry.ledger import Ledger, ledger_model
from vismem.registry.server import mlflow_server
from vismem.registry.versions import Version
from vismem.serving.champion import follower

RACES = int(os.environ.get("VISMEM_RACES", "3"))


@pytest.mark.parametrize("place", ["its file", "its server"])
def test_of_promoters_and_rollbacks_at_once_each_move_has_one_winner_and_each_process_hears_the_truth(
    project: Project, place: str
) -> None:
    """Behind the server one of them uses the file as before: they share no lock."""
    races = Races(project)
    served = mlflow_server(project.config, 0) if place == "its server" else nullcontext()
    with served as server:
        if server:
            project.connect(server[0])
        for seed in range(RACES):
            races.run(seed)


def plain(number: str) -> Version:
    return Version(number, "", "", 0.0, {})


def test_a_move_on_a_ledger_that_has_grown_is_not_made(project: Project) -> None:
    ours, theirs = project.store, project.store
    empty = read_ledger(ours)
    assert (empty.champion, empty.revision) == (None, 0)
    assert append(theirs, empty, first := empty.next_move("promote", plain("1")))
    assert not append(ours, empty, empty.next_move("promote", plain("2")))
    assert read_ledger(ours) == read_ledger(theirs) == Ledger(moves=(first,))
    assert append(ours, read_ledger(ours), read_ledger(ours).next_move("promote", plain("2")))
    assert project.moves == [("promote", "1", None), ("promote", "2", "1")]


def test_a_request_that_arrives_twice_makes_one_move_and_its_sender_hears_so(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a client repeats a request because the first answer was lost."""
    store, send = project.store, champion._write
    monkeypatch.setattr(champion, "_write", lambda *given: (send(*given), send(*given)))
    for version in ("1", "2"):
        ledger = read_ledger(store)
        assert append(store, ledger, ledger.next_move("promote", plain(version)))
    assert project.moves == [("promote", "1", None), ("promote", "2", "1")]


def test_an_alias_from_before_there_was_a_ledger_is_adopted(project: Project) -> None:
    project.build(b"one", score=66.0)
    project.run("register")
    project.store.client.set_registered_model_alias("vismem", "champion", "1")
    assert [row["aliases"] for row in listing.models(project.config)] == ["champion, challenger"]
    assert project.release(b"two", score=65.0)["promoted"] is False
    assert project.release(b"three", score=67.0)["previous"] == "1"
    assert project.moves == [("adopt", "1", None), ("promote", "3", "1")]


def test_of_a_model_made_anew_no_version_is_champion_by_its_number_alone(project: Project) -> None:
    project.release(b"one", score=66.0)
    project.store.client.delete_registered_model("vismem")
    refused = project.release(b"two", score=50.0, gain=-10.0)
    assert (refused["version"], refused["promoted"], project.champion()) == ("1", False, None)
    deployed = project.artifacts / "deploy" / "model_repository" / project.config.deploy.model_name / "1"
    deployed.mkdir(parents=True)
    (deployed / "bundle").symlink_to(project.steps["export"])
    for served in (champion.champion_version, lambda _: follower(project.config, project.artifacts)()):
        with pytest.raises(UserError, match="version 1 of 'vismem', the champion, is no longer"):
            served(project.store)
    assert project.release(b"three", score=67.0)["promoted"] is True
    with pytest.raises(UserError, match="no earlier champion"):
        release.rollback(project.config)
    project.store.client.delete_registered_model("vismem")
    project.release(b"four", score=50.0, gain=-10.0)
    made = project.release(b"five", score=60.0)
    assert (made["version"], made["promoted"], project.champion()) == ("2", True, "2")
    assert "champion version 2 has no usable score" in made["reasons"][-1]
    assert project.moves == [("promote", *move) for move in (("1", None), ("2", "1"), ("2", "2"))]


def test_an_entry_deleted_in_mlflow_is_named(project: Project) -> None:
    for number, score in enumerate((66.0, 68.0, 70.0)):
        project.release(bytes([number]), score)
    project.store.client.delete_model_version(ledger_model("vismem"), "2")
    with pytest.raises(UserError, match="has lost its entry 2"):
        release.rollback(project.config)


def overtake(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Let another act between the next decision and its move."""
    original = champion.append

    def append_late(*given: Any) -> bool:
        monkeypatch.setattr(champion, "append", original)
        act()
        return original(*given)

    monkeypatch.setattr(champion, "append", append_late)


def test_a_rollback_beside_a_promotion_leaves_only_the_champion_that_was_seen(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.release(b"one", score=66.0)
    project.release(b"two", score=68.0)
    project.build(b"three", score=70.0)
    project.run("register")
    overtake(monkeypatch, lambda: project.run("promote"))
    with pytest.raises(UserError, match=r"version 3 of 'vismem' became champion meanwhile, instead of version 2"):
        release.rollback(project.config)
    assert project.champion() == "3"
    overtake(monkeypatch, lambda: release.rollback(project.config))
    with pytest.raises(UserError, match="version 2 of 'vismem' became champion meanwhile"):
        release.rollback(project.config)
    project.build(b"four", score=69.0)
    project.run("register")
    overtake(monkeypatch, lambda: release.rollback(project.config))
    made = project.run("promote")
    assert (made["promoted"], made["previous"]) == (True, "1")
    assert "champion version 1 66.00" in made["reasons"][-1], "judged again"
    assert project.moves[2:] == [
        ("promote", "3", "2"),
        ("rollback", "2", "3"),
        ("rollback", "1", "2"),
        ("promote", "4", "1"),
    ]


def test_who_mends_the_view_sees_moves_made_meanwhile_and_edits_that_another_made_first(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.release(b"one", score=66.0)
    project.release(b"two", score=68.0)
    project.build(b"three", score=70.0)
    project.run("register")
    edit, client = MlflowClient.set_registered_model_alias, project.store.client
    client.set_registered_model_alias("vismem", "champion", "1")

    def edit_late(*given: Any) -> None:
        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", edit)
        project.run("promote")
        edit(*given)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", edit_late)
    champion.mend_view(project.store)
    assert project.champion() == "3"

    def edit_in_vain(*given: Any) -> None:
        edits.append(given)
        if len(edits) == 2:
            edit(*given)  # another's
        raise MlflowException("UNIQUE constraint failed")

    edits: list[Any] = [None]
    client.set_registered_model_alias("vismem", "champion", "1")
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", edit_in_vain)
    champion.mend_view(project.store)
    edit(client, "vismem", "champion", "1")
    with pytest.raises(MlflowException, match="UNIQUE"):
        champion.mend_view(project.store)
    assert len(edits) == 4
