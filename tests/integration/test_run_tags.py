"""A run is found again by its tags, whatever stands in them."""

import pytest
from project import Project

from vismem.registry.runs import tracked_run
from vismem.registry.tracking import tag_is


@pytest.mark.parametrize("path", ["data/mine.jsonl", "data/O'Brien.jsonl", 'data/"mine".jsonl', "100 %.jsonl"])
def test_a_run_left_by_a_killed_process_is_ended(project: Project, path: str) -> None:
    store, tags = project.store, {"data_path": path, "n": "600"}
    with tracked_run(store, "one", tags, {}) as left:
        with tracked_run(store, "one", tags, {}):
            assert store.client.get_run(left).info.status == "KILLED"
        experiment = store.client.get_run(left).info.experiment_id
        assert len(store.client.search_runs([experiment], tag_is("data_path", path))) == 2
