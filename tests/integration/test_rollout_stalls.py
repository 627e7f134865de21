"""What a rollout makes of a cluster that is at fault itself: no version is taken back for it."""

import re
from typing import Any

import pytest
from deployments_api import RefusedError
from rollout_project import Here, Killed, kill

from vismem import rollout


def test_a_version_that_all_served_is_not_taken_back_when_the_cluster_stalls_later(here: Here) -> None:
    """As where a new image cannot be pulled."""
    here.release(b"two", 68.0)
    assert here.roll_out().startswith("version 2 is served by all")
    here.cluster.broken.add("2")
    for pod in here.cluster.pods["triton"]:
        pod["ready"] = False
    here.cluster.settle()
    told = here.roll_out()
    assert re.search("all served release 2-[0-9a-f]{8} before: nothing was changed", told)
    here.cluster.broken.clear()
    assert here.state == (["2", "2"], [], "2")


def test_what_a_killed_job_changed_is_taken_back_by_the_next_where_pods_do_not_come_up(here: Here) -> None:
    here.release(b"two", 68.0)
    here.pods.meanwhile = lambda: here.cluster.broken.add("2")
    with here.patch.context() as patch:
        patch.setattr(rollout, "_check_pins", lambda *_: kill())  # called first when the servers were told
        with pytest.raises(Killed):
            here.roll_out()
    assert "the servers go back to the version before" in here.roll_out()
    assert here.state[0] == ["1", "1"]


@pytest.mark.parametrize("status", [429, 500, 503, None], ids=str)
def test_a_request_that_fails_once_is_repeated(here: Here, status: int | None) -> None:
    """With a status after its work was done, so that a patch is made twice; or unanswered."""
    here.release(b"two", 68.0)
    handle, failed = here.cluster.handle, 0

    def fail(verb: str, *given: Any) -> Any:
        nonlocal failed
        found = handle(verb, *given)
        failed += 1
        if failed % 2 == 0:
            return found
        raise RefusedError(status, "try again") if status else ConnectionError

    here.cluster.handle = fail  # type: ignore[method-assign]
    assert here.roll_out().startswith("version 2 is served by all")
    told = here.cluster.service or here.cluster.deployments["triton"]
    assert told["metadata"]["annotations"]["before.vismem/version"].startswith("1-"), "though the change was made twice"


def test_a_way_back_whose_answer_was_lost_is_no_other_rollout_s(here: Here) -> None:
    here.release(b"two", 68.0)
    here.pods.meanwhile = lambda: here.cluster.broken.add("2")
    handle, lost = here.cluster.handle, [True]

    def fail(verb: str, *given: Any) -> Any:
        found = handle(verb, *given)
        if lost and verb == "patch" and "'vismem/version': '1-" in repr(given[-1]):
            lost.clear()
            raise RefusedError(503, "try again")
        return found

    here.cluster.handle = fail  # type: ignore[method-assign]
    assert "the servers go back to the version before" in here.roll_out()
    assert not lost


def test_a_cluster_whose_api_stays_away_is_named(here: Here) -> None:
    def fail(*_: Any) -> Any:
        raise RefusedError(503, "Service Unavailable")

    here.patch.setattr(rollout, "PATIENCE", 0)
    here.cluster.handle = fail  # type: ignore[method-assign]
    assert "in namespace 'kubeflow' cannot be read: 503 Service Unavailable" in here.roll_out()


def test_a_deadline_that_an_earlier_rollout_missed_is_not_taken_for_this_one_s(here: Here) -> None:
    """After a change Kubernetes may count the new generation as seen a moment before it drops the old condition."""
    here.release(b"two", 68.0)
    handle, changed = here.cluster.handle, set[str]()

    def late(verb: str, resource: str, name: str, body: Any) -> Any:
        found = handle(verb, resource, name, body)
        if verb == "patch":
            changed.add(name)
        elif name in changed:
            changed.remove(name)
            found["status"]["conditions"] = [{"reason": "ProgressDeadlineExceeded"}]
        return found

    here.cluster.handle = late  # type: ignore[method-assign]
    assert here.roll_out().startswith("version 2 is served by all")
