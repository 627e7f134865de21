"""A released version reaches the servers of a cluster, or the one before stays everywhere: a real store, an API.

Pods answer as a test says of their version; tests/e2e/test_canary.py asks a real Triton.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from deployments_api import ANSWER, at_request, served
from kubernetes.config import load_kube_config
from project import Project
from rollout_project import Here, Killed, kill

from vismem import rollout
from vismem.config import Config
from vismem.registry import release
from vismem.registry.champion import read_ledger
from vismem.serving import repository
from vismem.serving.exchange import (
    Answer,
    BusyError,
    DeadlineError,
    DisconnectedError,
    ServerError,
    UnauthorizedError,
)

WRONG, OWN = "three", "how many dots?"


def test_a_new_champion_is_asked_as_a_canary_before_the_servers_follow(here: Here) -> None:
    here.release(b"two", 68.0)
    seen = []
    here.pods.meanwhile = lambda: seen.append((here.cluster.versions(), here.cluster.versions("triton-canary")))
    assert here.roll_out().startswith("version 2 is served by all")
    assert seen == [(["1", "1"], ["2"])]
    assert here.state == (["2", "2"], [], "2")
    assert here.roll_out() == "version 2 is served by all pods of 'triton': they were told so before"
    release.rollback(here.project.config)
    assert here.roll_out().startswith("version 1 is served by all")
    assert here.state == (["1", "1"], [], "1")


@pytest.mark.parametrize("answer", [WRONG, ServerError("the model failed")])
def test_a_version_that_answers_wrongly_is_rolled_back_and_the_one_before_stays_everywhere(
    here: Here, answer: Any
) -> None:
    here.release(b"two", 68.0)
    here.pods.answers["2"] = answer
    told = here.roll_out()
    assert told.startswith("failed: version 2 is refused, the servers serve what they did: ")
    assert "version 1 is champion again, instead of version 2" in told
    assert here.state == (["1", "1"], [], "1")
    assert "2" in read_ledger(here.project.store).blocked
    assert here.roll_out().endswith("they were told so before")
    assert "rolled back" in release.promote_version(here.project.config, "2")


@pytest.mark.parametrize("answer", [ANSWER, WRONG])
def test_another_vismem_brings_its_code_to_the_servers_and_is_no_fault_of_the_version(here: Here, answer: str) -> None:
    newer = here.cluster.models / "model.py"
    newer.write_bytes(repository.MODEL_SOURCE.read_bytes() + b"# newer")
    here.patch.setattr(repository, "MODEL_SOURCE", newer)
    here.pods.answers["1"] = answer
    told = here.roll_out()
    ledger = read_ledger(here.project.store)
    assert (here.state, ledger.blocked) == ((["1", "1"], [], "1"), {})
    serving = {(pod["release"] / "vismem/1/model.py").read_bytes() for pod in here.cluster.pods["triton"]}
    if answer == ANSWER:
        assert told.startswith("version 1 is served by all")
        assert serving == {newer.read_bytes()}
        assert here.roll_out().endswith("they were told so before")
    else:
        assert told.startswith("failed: version 1, which the servers serve, answers otherwise with this VisMem: ")
        assert newer.read_bytes() not in serving


def test_another_bundle_under_the_served_number_that_answers_wrongly_is_rolled_back(here: Here) -> None:
    database = here.project.artifacts.parent / "mlflow.db"
    backup = database.read_bytes()
    here.release(b"two", 68.0)
    here.roll_out()
    database.write_bytes(backup)
    here.release(b"other two", 68.0)
    here.pods.answers["2"] = WRONG
    assert here.roll_out().startswith("failed: version 2 is refused, the servers serve what they did: ")
    assert here.state == (["2", "2"], [], "1")


@pytest.mark.parametrize("stays_away", [False, True])
def test_a_ledger_that_cannot_be_changed_for_a_moment_is_changed_then_and_else_the_job_says_so(
    here: Here, stays_away: bool
) -> None:
    here.release(b"two", 68.0)
    here.pods.answers["2"] = WRONG
    back, asked = rollout.rollback, list[str]()

    def rollback(config: Config, left: str) -> str:
        asked.append(left)
        if stays_away:
            here.patch.setattr(rollout, "POLL", -1)  # which cannot be slept: it is told at once
        if stays_away or len(asked) < 3:
            raise rollout.UserError("MLflow: 503")
        return back(config, left=left)

    here.patch.setattr(rollout, "rollback", rollback)
    here.patch.setattr(rollout, "PATIENCE", 0.0 if stays_away else 300.0)
    told = here.roll_out()
    if stays_away:
        assert "the ledger could NOT be changed, `vismem models rollback` does it: MLflow: 503" in told
    else:
        assert "version 1 is champion again" in told
    assert here.state == (["1", "1"], [], "2" if stays_away else "1")


@pytest.mark.parametrize("error", [BusyError("a"), DeadlineError("b"), DisconnectedError("c"), UnauthorizedError("d")])
def test_a_canary_that_is_busy_late_or_gone_or_wants_a_token_is_no_fault_of_its_version(
    here: Here, error: Exception
) -> None:
    here.release(b"two", 68.0)
    here.pods.answers["2"] = error
    assert here.roll_out() == f"failed: {error}"
    ledger = read_ledger(here.project.store)
    assert (ledger.champion, ledger.blocked, here.cluster.versions()) == ("2", {}, ["1", "1"])


def test_a_first_version_that_answers_wrongly_is_served_by_nobody(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Here(project, tmp_path, monkeypatch)
    found.pods.answers["1"] = WRONG
    with served(found.cluster, tmp_path) as kubeconfig:
        monkeypatch.setattr(rollout, "load_config", lambda: load_kube_config(str(kubeconfig)))
        found.release(b"one", 66.0)
        assert "there is no earlier champion" in found.roll_out()
        assert found.state == ([], [], "1")


def test_questions_of_yours_are_judged_against_the_version_before(here: Here) -> None:
    def write(questions: int) -> None:
        rows = [
            {"id": str(n), "image": f"data:image/png;base64,{n:04}", "prompt": OWN, "answer": ANSWER}
            for n in range(questions)
        ]
        (here.cluster.models / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))

    here.release(b"two", 68.0)
    original = here.pods.ask

    def ask(images: Any, question: str, max_new_tokens: int) -> Answer:
        here.pods.answers = {"2": WRONG} if question == OWN else {}
        return original(images, question, max_new_tokens)

    here.pods.ask = ask  # type: ignore[method-assign]
    write(5)  # all wrong, and too few to tell
    assert here.roll_out().endswith("1 golden answers, 0 of 5 of questions.jsonl right, 5 by the version before")
    release.rollback(here.project.config)
    assert here.roll_out().startswith("version 1 is served")
    release.promote_version(here.project.config, "2", unblock=True)
    write(6)
    assert "0 of 6 of questions.jsonl right, 6 by the version before (p = 0.031)" in here.roll_out()
    assert here.state == (["1", "1"], [], "1")


@pytest.mark.parametrize("broken", ["canary", "servers"])
def test_pods_that_do_not_become_ready_leave_the_version_before_and_the_ledger(here: Here, broken: str) -> None:
    here.release(b"two", 68.0)
    if broken == "canary":
        here.cluster.broken.add("2")
    else:
        here.pods.meanwhile = lambda: here.cluster.broken.add("2")
    told = here.roll_out()
    name = here.cluster.deployments["triton-canary" if broken == "canary" else "triton"]["metadata"]["name"]
    assert told.startswith(f"failed: the pods of deployment '{name}' did not become ready in time")
    assert here.state[0] == ["1", "1"]
    assert read_ledger(here.project.store).champion == "2", "a cluster without room is no fault of a version"
    here.cluster.broken.clear()
    here.pods.meanwhile = lambda: None
    assert here.roll_out().startswith("version 2 is served by all")
    assert here.state == (["2", "2"], [], "2")


@pytest.mark.parametrize("answer", [ANSWER, WRONG])
def test_a_job_killed_at_any_request_is_finished_by_the_next(here: Here, answer: str) -> None:
    here.release(b"two", 68.0)
    here.pods.answers["2"] = answer
    expected = "2" if answer == ANSWER else "1"
    killed = 0
    while True:
        killed += 1
        here.rewind()
        try:
            with at_request(here.patch, killed, kill):
                here.roll_out()
            break
        except Killed:
            assert set(here.state[0]) in ({"1"}, {"2"})
        told = here.roll_out()
        assert here.state == ([expected] * 2, [], expected), (killed, told)
    assert killed > 8


@pytest.mark.parametrize("newer", [False, True], ids=["same champion", "newer champion"])
def test_of_two_jobs_at_once_one_ends_the_other_and_wins(here: Here, newer: bool) -> None:
    here.release(b"two", 68.0)
    told, wins = list[str](), "3" if newer else "2"

    def second() -> None:
        if newer:
            here.release(b"three", 70.0)
        told.append(here.roll_out())

    while True:
        number = len(told)
        here.rewind()
        with at_request(here.patch, number + 1, second):
            first = here.roll_out()
        if len(told) == number:
            break
        assert here.state == ([wins] * 2, [], wins), number
        assert told[-1].startswith(f"version {wins} is served by all")
        fits = "failed: version 2 is champion no more" if newer else "version 2 is served by all"
        assert first.startswith((fits, "failed: another rollout has taken over")), number
    assert here.state == (["2", "2"], [], "2")
    assert len(told) > 8


def test_a_job_of_an_older_champion_does_not_undo_a_newer_one(here: Here) -> None:
    here.release(b"two", 68.0)

    def overtake() -> None:
        here.pods.meanwhile = lambda: None
        here.release(b"three", 70.0)
        assert here.roll_out().startswith("version 3 is served by all")

    here.pods.meanwhile = overtake
    assert here.roll_out().startswith("failed: another rollout has taken over")
    assert here.state == (["3", "3"], [], "3")


def test_an_older_champion_s_wrong_answer_does_not_roll_back_a_newer_one(here: Here) -> None:
    here.release(b"two", 68.0)
    here.pods.answers["2"] = WRONG
    here.pods.meanwhile = lambda: read_ledger(here.project.store).champion == "2" and here.release(b"three", 70.0)
    assert "version 3 is champion: nothing is to be rolled back" in here.roll_out()
    assert here.state == (["1", "1"], [], "3")


def test_pods_added_at_any_moment_serve_what_their_siblings_serve(here: Here) -> None:
    here.release(b"two", 68.0)
    here.pods.meanwhile = lambda: here.cluster.scale("triton", 4)
    seen = []
    here.cluster.before_request = lambda _: seen.append(set(here.cluster.versions()))
    assert here.roll_out().startswith("version 2 is served by all")
    assert here.state == (["2"] * 4, [], "2")
    here.release(b"three", 70.0)
    here.cluster.scale("triton", 5)
    for pod in here.cluster.pods["triton"][:2]:  # restarted
        here.cluster.pods["triton"].remove(pod)
    assert here.state == (["2"] * 5, [], "3"), "the champion is not what decides"


def test_a_release_that_was_changed_on_the_volume_is_served_by_no_pod_that_starts(here: Here) -> None:
    (manifest,) = (here.cluster.models / "releases").glob("1-*/vismem/manifest.json")
    manifest.write_text(manifest.read_text() + " ")
    here.cluster.scale("triton", 3)
    here.cluster.settle()
    assert [pod["ready"] for pod in here.cluster.pods["triton"]] == [True, True, False]


def test_a_rollout_uses_all_rights_that_its_role_gives_and_no_other(here: Here) -> None:
    here.release(b"two", 68.0)
    here.roll_out()
    given = {
        (resource, verb, name)
        for rule in here.cluster.rules
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule["resourceNames"]
    }
    assert {(resource.split("/")[-1], verb, name) for resource, verb, name in here.cluster.used} == given
    rules = here.cluster.rules
    here.cluster.rules = []
    kind = "inferenceservice" if here.kserve else "deployment"
    assert f"{kind} 'triton' in namespace 'kubeflow' cannot be read: 403 Forbidden" in here.roll_out()
    release.rollback(here.project.config)
    here.cluster.rules = [rule | {"verbs": ["get"]} for rule in rules]
    assert "deployment 'triton-canary' in namespace 'kubeflow' cannot be changed: 403 Forbidden" in here.roll_out()
