"""What a rollout makes of a cluster that is at fault itself: no version is taken back for it."""

import pytest
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
    assert "all served version 2 before: nothing was changed" in told
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
