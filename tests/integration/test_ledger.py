"""The ledger of champions where it is kept: in a registry on SQLite, and in a real S3 server by conditional PUT."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from project import Project
from races import PROMOTERS, race

from vismem import stack
from vismem.errors import UserError
from vismem.registry import listing, release
from vismem.registry.bucket import BucketPlace
from vismem.registry.champion import Place, RegistryPlace
from vismem.registry.ledger import Ledger, ledger_model
from vismem.registry.server import mlflow_server
from vismem.registry.tracking import find_version
from vismem.services import free_ports
from vismem.serving.publish import publish

ROUNDS = 100
DEAD = "http://127.0.0.1:9"  # the discard port: nobody listens


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A place in the S3 server that `vismem stack` runs; boto3 finds it by the environment."""
    folder = tmp_path_factory.mktemp("s3")
    port = free_ports({"s3": 0, **dict.fromkeys(stack.S3_INNER, 0)})
    clients = {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port['s3']}",
        "AWS_ACCESS_KEY_ID": "vismem-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    weed, _ = stack._programs()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in clients.items():
            patch.setenv(name, value)
        with stack._start_s3(weed, folder, port, dict(os.environ)) as server:
            server.wait_until(lambda: stack._make_bucket(clients))
            yield f"s3://{stack.BUCKET}/ledger"


Places = Callable[[str, int], Place]


@pytest.fixture(params=["registry", "S3"])
def places(request: pytest.FixtureRequest, project: Project) -> Places:
    """The ledger of the model of that name, as one of several machines sees it: each has a client of its own."""
    if request.param == "S3":
        bucket = request.getfixturevalue("bucket")
        clients = [BucketPlace(bucket, "any")._client for _ in range(PROMOTERS)]

        def in_bucket(model: str, machine: int) -> Place:
            place = BucketPlace(bucket, model)
            place._client = clients[machine]
            return place

        return in_bucket
    stores = [project.store for _ in range(PROMOTERS)]

    def in_registry(model: str, machine: int) -> Place:
        config = project.config.registry.model_copy(update={"model_name": model})
        return RegistryPlace(replace(stores[machine], config=config))

    return in_registry


def test_of_eight_promoters_the_best_is_champion_and_each_move_has_one_winner_in_a_hundred_races(
    places: Places,
) -> None:
    for number in range(ROUNDS):
        race(partial(places, f"race-{number}"), seed=number)


def test_a_move_on_a_ledger_that_has_grown_is_not_made(places: Places) -> None:
    ours, theirs = places("grown", 0), places("grown", 1)
    empty = ours.read()
    assert (empty.champion, empty.revision) == (None, 0)
    assert theirs.append(empty, first := empty.next_move("promote", "1"))
    assert not ours.append(empty, empty.next_move("promote", "2"))
    assert ours.read() == theirs.read() == Ledger(moves=(first,))
    assert ours.append(ours.read(), ours.read().next_move("promote", "2"))
    assert [(move.version, move.previous) for move in theirs.read().moves] == [("1", None), ("2", "1")]


def test_a_request_that_arrives_twice_makes_one_move_and_its_sender_hears_so(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a client repeats a request because the first answer was lost."""
    place = places("echo", 0)
    assert place.append(place.read(), place.read().next_move("promote", "1"))
    name = "_put" if isinstance(place, BucketPlace) else "_write"
    send = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *given: (send(*given), send(*given))[1])
    assert place.append(place.read(), place.read().next_move("promote", "2"))
    assert [move.version for move in place.read().moves] == ["1", "2"]


def with_ledger(project: Project, address: str) -> None:
    registry = project.config.registry.model_copy(update={"ledger": address})
    project.config = project.config.model_copy(update={"registry": registry})


def test_releases_with_a_ledger_in_s3_are_promoted_listed_rolled_back_and_published(
    project: Project, bucket: str, tmp_path: Path
) -> None:
    with_ledger(project, f"{bucket}/whole")
    project.release(b"one", score=66.0)
    project.release(b"two", score=68.0)
    assert (project.champion(), project.release(b"three", score=67.0)["promoted"]) == ("2", False)
    release.rollback(project.config)
    assert project.moves == [("promote", "1", None), ("promote", "2", "1"), ("rollback", "1", "2")]
    assert [row["verdict"] for row in listing.models(project.config)] == ["refused", "blocked", "passed"]
    assert "version 1 is current" in publish(project.config, tmp_path / "models")
    assert listing.read_registry(project.config.registry) == listing.ask_mlflow(project.config.registry)
    assert not [model for model in project.store.client.search_registered_models() if model.name.endswith("-ledger")]


def test_a_ledger_elsewhere_than_before_is_refused_and_a_new_one_begins_with_the_alias(
    project: Project, bucket: str
) -> None:
    project.release(b"one", score=66.0)
    project.build(b"two", score=60.0)
    project.run("register")
    with_ledger(project, f"{bucket}/moved")
    with pytest.raises(
        UserError, match=r"'vismem' is in the registry, but registry.ledger leads to s3://.*/vismem\.json"
    ):
        project.run("promote")
    project.store.client.delete_registered_model_tag("vismem", "ledger")
    assert project.run("promote")["promoted"] is False
    assert project.moves == [("adopt", "1", None)]


def test_an_alias_from_before_there_was_a_ledger_is_adopted(project: Project) -> None:
    project.build(b"one", score=66.0)
    project.run("register")
    project.store.client.set_registered_model_alias("vismem", "champion", "1")
    assert [row["aliases"] for row in listing.models(project.config)] == ["champion, challenger"]
    assert project.release(b"two", score=65.0)["promoted"] is False
    assert project.release(b"three", score=67.0)["previous"] == "1"
    assert project.moves == [("adopt", "1", None), ("promote", "3", "1")]


@pytest.mark.parametrize("fault", ["no server", "damaged", "conditions are ignored"])
def test_a_bucket_that_cannot_keep_a_ledger_is_one_plain_error(
    bucket: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = BucketPlace(f"{bucket}/{fault.replace(' ', '-')}", "vismem")
    said = {
        "no server": r"cannot be reached \(.*registry\.ledger",
        "damaged": "is damaged",
        "c": "ignores the condition",
    }
    if fault == "no server":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", DEAD)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    elif fault == "damaged":
        name, _, key = place.where.removeprefix("s3://").partition("/")
        place._client.put_object(Bucket=name, Key=key, Body=b'{"moves": [{}]}')
    else:
        put = place._put
        monkeypatch.setattr(place, "_put", lambda body, _: put(body, {}))  # as a server that knows no conditions
    with pytest.raises(UserError, match=said.get(fault, said["c"])):
        place.append(place.read(), Ledger().next_move("promote", "1"))


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
    judge = release.judge_version
    with mlflow_server(project.config, 0) as (address, _):
        by_file = project.config
        registry = by_file.registry.model_copy(update={"tracking_uri": address})
        by_server = by_file.model_copy(update={"registry": registry})
        for first, (slow, quick) in ((60.0, (by_file, by_server)), (70.0, (by_server, by_file))):
            for score, folder in ((first, "slow"), (first + 1, "quick")):
                project.build(f"{score}".encode(), score=score)
                project.run("register", folder)
            overtaken: list[str] = []

            def judge_slowly(*given: Any, slow: Any = slow, quick: Any = quick, overtaken: Any = overtaken) -> Any:
                verdict = judge(*given)
                if not overtaken:
                    overtaken.append("")
                    project.config = quick
                    assert project.run("promote", "quick")["promoted"]
                    project.config = slow
                return verdict

            monkeypatch.setattr(release, "judge_version", judge_slowly)
            project.config = slow
            made = project.run("promote", "slow")
            monkeypatch.setattr(release, "judge_version", judge)
            assert made["promoted"] is False
            assert f"{first + 1:.2f}" in made["reasons"][0]
            champion = find_version(project.store, "champion")
            assert champion is not None
            assert float(champion.tags["score"]) == first + 1
            project.config = by_file
    assert len(project.moves) == 2
