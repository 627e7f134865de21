"""Where a launch works: a folder for a step with its parameters, inputs and code, where its output stays for days."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from vismem.config import Config
from vismem.errors import UserError
from vismem.launch import KEPT, LEFT, LaunchConfig, launch_step
from vismem.locks import lock_folder
from vismem.steps import BY_NAME


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / "inputs" / name for name in BY_NAME["stage2"].inputs}
    for folder in folders.values():
        folder.mkdir(parents=True)
    return folders


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that stage2 was made in, in order."""
    made: list[str] = []
    monkeypatch.delenv("KFP_RUN_ID", raising=False)

    def run(name: str, config: Config, place: Path, *_: Any) -> str:
        made.append(place.name)
        (place / name).mkdir(parents=True)
        (place / name / "metrics.json").write_text("{}")
        return f"{name}: done"

    monkeypatch.setattr("vismem.launch._run", run)
    return made


def test_a_run_that_could_not_hand_its_output_over_has_it_again_and_another_makes_its_own(
    tmp_path: Path, inputs: dict[str, Path], places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for count, run in enumerate(("a", "a", "b", "a", "b")):
        monkeypatch.setenv("KFP_RUN_ID", run)
        line = launch_step("stage2", Config(), tmp_path / str(count), inputs, work=tmp_path / "work" / "aaaa")
        assert (tmp_path / str(count) / "stage2" / "metrics.json").is_file()
        assert line.startswith("stage2: done" if count in (0, 2) else "stage2: made before")
    assert len(places) == 2
    (place,) = {*(tmp_path / "work" / "aaaa").iterdir()}
    age(place / "stage2.run-a")
    monkeypatch.setenv("KFP_RUN_ID", "c")
    launch_step("stage2", Config(), tmp_path / "c", inputs, work=tmp_path / "work" / "aaaa")
    assert {made.name for made in place.glob("stage2.run-*")} == {"stage2.run-b", "stage2.run-c"}


def age(place: Path, seconds: float = KEPT) -> None:
    """As it is when its output is no longer kept."""
    os.utime(place, times=(0, time.time() - seconds - 60))


def test_outputs_that_were_made_long_ago_are_removed_also_those_of_other_code_and_no_others(
    tmp_path: Path, inputs: dict[str, Path], places: list[str]
) -> None:
    work = tmp_path / "work"

    def made(code: str, seed: int) -> Path:
        config = Config.model_validate({"seed": seed})
        launch_step("stage2", config, tmp_path / code / str(seed), inputs, work=work / code)
        return work / code / places[-1]

    first, second, busy, new = made("aaaa", 1), made("bbbb", 2), made("aaaa", 3), made("aaaa", 4)
    half = work / "aaaa" / "vismem-stage2-half"
    (half / "stage2.partial").mkdir(parents=True)  # checkpoints
    (half / "lock").touch()
    for place in (first, second, busy, half):
        age(place)
    with lock_folder(busy):
        last = made("bbbb", 5)
    assert {*work.glob("*/*")} == {busy, new, half, last}


def test_what_attempts_left_that_never_ended_is_removed_weeks_after_their_last_checkpoint(
    tmp_path: Path, inputs: dict[str, Path], places: list[str]
) -> None:
    work = tmp_path / "work" / "aaaa"
    failed, resumed = work / "vismem-stage1-failed", work / "vismem-stage1-resumed"
    for place in (failed, resumed):
        (place / "inputs" / "base").mkdir(parents=True)
        checkpoint = place / "stage1.partial" / "checkpoint-3" / "state"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        (place / "lock").touch()
        for path in (*place.rglob("*"), place):
            if path != resumed / "stage1.partial" / "checkpoint-3":
                age(path, LEFT)
    launch_step("stage2", Config(), tmp_path / "out", inputs, work=work)
    assert {*work.iterdir()} == {resumed, work / places[-1]}


def test_what_a_kill_leaves_of_a_work_folder_is_never_taken_for_the_output(
    tmp_path: Path, inputs: dict[str, Path], places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, remove = tmp_path / "work" / "aaaa", shutil.rmtree
    launch_step("stage2", Config(), tmp_path / "first", inputs, work=work)
    age(work / places[0])

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if ".gone" not in folder.name:
            return remove(folder, ignore_errors=ignore_errors)
        remove(folder / "stage2.run-")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            launch_step("stage2", Config(), tmp_path / "second", inputs, work=work)
    assert launch_step("stage2", Config(), tmp_path / "again", inputs, work=work) == "stage2: done"
    assert (tmp_path / "again" / "stage2" / "metrics.json").is_file()
    assert [place.name for place in work.iterdir()] == places[1:]


def test_of_a_finished_work_folder_only_the_output_stays(
    tmp_path: Path, inputs: dict[str, Path], places: list[str]
) -> None:
    launch = LaunchConfig("trainer", num_nodes=2, image="vismem-train:1", shared=tmp_path)
    launch_step("stage2", Config(), tmp_path / "out", inputs, launch)
    assert {path.name for path in (tmp_path / places[0]).iterdir()} == {"lock", "stage2.run-"}


def test_on_a_shared_volume_other_code_works_in_another_folder(
    tmp_path: Path, inputs: dict[str, Path], places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    launch = LaunchConfig("trainer", num_nodes=2, image="vismem-train:1", shared=shared)
    for number, code in enumerate(("aaaa", "aaaa", "bbbb")):
        monkeypatch.setenv("KFP_RUN_ID", str(number))
        launch_step("stage2", Config(), tmp_path / str(number), inputs, launch, shared / "work" / code)
    assert places[0] == places[1] != places[2]


def test_a_lock_that_outlived_its_machine_names_the_file_to_delete(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock_folder(tmp_path):  # as on a network file system that never learnt of that end
        lock.write_text(json.dumps({"pid": 17, "host": "gone", "since": 0.0}))
        with (
            pytest.raises(UserError, match=f"`kill 17` there; where it is gone, delete {re.escape(str(lock))}"),
            lock_folder(tmp_path),
        ):
            pass
        lock.unlink()
        with lock_folder(tmp_path):
            pass
