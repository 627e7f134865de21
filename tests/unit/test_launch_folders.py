"""Where a launch works: in a folder for a step with its parameters, inputs and code, which is gone once it is made."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from vismem.config import Config
from vismem.launch import LaunchConfig, launch_step
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

    def run(name: str, config: Config, place: Path, *_: Any) -> str:
        made.append(place.name)
        (place / name).mkdir(parents=True)
        (place / name / "metrics.json").write_text("{}")
        return f"{name}: done"

    monkeypatch.setattr("vismem.launch._run", run)
    return made


def test_what_a_kill_leaves_of_a_work_folder_is_never_taken_for_the_output(
    tmp_path: Path, inputs: dict[str, Path], places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, remove = tmp_path / "work", shutil.rmtree

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if ".gone" not in folder.name:
            return remove(folder, ignore_errors=ignore_errors)
        next(folder.rglob("metrics.json")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            launch_step("stage2", Config(), tmp_path / "first", inputs, work=work)
    assert launch_step("stage2", Config(), tmp_path / "again", inputs, work=work) == "stage2: done"
    assert (tmp_path / "again" / "stage2" / "metrics.json").is_file()
    assert list(work.iterdir()) == []


def test_on_a_shared_volume_other_code_works_in_another_folder(
    tmp_path: Path, inputs: dict[str, Path], places: list[str]
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    launch = LaunchConfig("trainer", num_nodes=2, image="vismem-train:1", shared=shared)
    for number, code in enumerate(("aaaa", "aaaa", "bbbb")):
        launch_step("stage2", Config(), tmp_path / str(number), inputs, launch, shared / "work" / code)
    assert places[0] == places[1] != places[2]
