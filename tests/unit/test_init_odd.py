"""`vismem init` on odd data, under odd names, killed, on a full disk: what is written can be run."""

import base64
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from init_project import Lines, picture, project, question, run, write

from vismem import files
from vismem.config import load_config
from vismem.data.prepare import prepare
from vismem.locks import lock_file

__all__ = ["project", "run"]  # fixtures


def test_an_image_inside_the_line_reaches_prepare_unharmed(project: Path, run: Callable[..., str]) -> None:
    """Base64 may hold `//`, which a path may not; and files of two folders are given another common one."""
    folder, lines = project.parent / "photos" / "in", Lines()
    folder.mkdir()
    for number in range(12):
        picture(folder / "own.png", number, (40 + number, 40))
        data = (folder / "own.png").read_bytes() + b"\xff" * 9  # behind the image's end: `////`
        lines.append(question(number + 100, image=f"data:image/png;base64,{base64.b64encode(data).decode()}"))
    run("own", "--data", write(folder, 0, lines), "--data", write(project.parent / "photos", 3))
    assert "2 validation, 10 train rows" in prepare(load_config(project / "params.yaml", "own"), {}, project / "out")


def test_folders_named_by_way_of_others_and_of_links_are_found_again(project: Path, run: Callable[..., str]) -> None:
    for name in ("near", "far"):
        (project.parent / "photos" / name).mkdir()
        write(project.parent / "photos" / name, more=[question(99, id=f"{name}-x", prompt=f"{name}?", image="1.png")])
    (project / "data" / "link").symlink_to(project.parent / "photos" / "far")
    run("own", "--data", "../photos/near/mine.jsonl", "--data", "data/link/mine.jsonl")
    assert "3 test, 1 validation, 10 train rows" in prepare(
        load_config(project / "params.yaml", "own"), {}, project / "out"
    )


def test_rows_without_ids_of_files_of_one_name_are_all_kept_and_no_given_id_is_taken(
    project: Path, run: Callable[..., str]
) -> None:
    photos = project.parent / "photos"
    write(photos)
    for name in ("x", "y"):
        (project.parent / name).mkdir()
        lines = [question(n, id=None, prompt=f"{name}?") for n in range(6)]
        lines += [question(n, id=f"mine-{n}", prompt=f"{name} again?") for n in range(3 * (name == "y"))]
        write(project.parent / name, 0, lines)
    named = [word for name in ("x", "y") for word in ("--data", project.parent / name / "mine.jsonl")]
    assert "15 rows, 15 good" in run("own", *named, "--images", photos)
    rows = [json.loads(line) for file in (project / "data" / "own").glob("*.jsonl") for line in file.open()]
    assert len({row["id"] for row in rows}) == 15
    assert {row["id"] for row in rows if "again" in row["prompt"]} == {"mine-0", "mine-1", "mine-2"}


def test_an_empty_group_ties_nothing_and_a_split_that_is_no_text_is_a_bad_row(
    project: Path, run: Callable[..., str]
) -> None:
    write(project.parent / "photos")
    lines: Lines = [question(n, group="") for n in range(12)]
    odd = question(20, image="1.png", prompt="how many?", split=["train"])
    file = write(project.parent / "photos", 0, [*lines, odd])
    said = run("own", "--data", file)
    assert "9 train, 1 validation, 2 test" in said
    assert "line 13: 'split' must be one of train, validation, val, dev, test, got ['train']" in said


def test_questions_about_nothing_and_about_videos_are_split_where_the_rules_allow_them(
    project: Path, run: Callable[..., str]
) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["validate"]["severities"] = {"images_present": "warning", "no_videos": "warning"}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    for name in ("one", "two"):
        folder = project.parent / "photos" / name
        lines = Lines()
        for number in range(6):
            (folder / f"clip{number}").mkdir(parents=True)
            picture(folder / f"clip{number}" / "0.png", number)
            clip = {"frames": f"clip{number}" if number % 2 else [f"clip{number}/0.png"], "fps": 1}
            lines.append(question(number, id=None, image=None, videos=[clip], prompt=f"{name} {number}?"))
            lines.append(question(number, id=None, image=None, images=[], prompt=f"{name} {number}?"))
        write(folder, 0, lines)
    run("own", *(word for name in ("one", "two") for word in ("--data", f"../photos/{name}/mine.jsonl")))
    said = prepare(load_config(project / "params.yaml", "own"), {}, project / "out")
    assert said.startswith("prepared 5 test, 2 validation, 17 train rows; data"), "no clip is in two splits"


def test_a_value_that_no_run_would_take_is_refused_before_anything_is_written(
    project: Path, run: Callable[..., str]
) -> None:
    assert "'seed'" in run("own", "--data", write(project.parent / "photos"), "--seed", -1, status=1)
    assert list((project / "data").iterdir()) == []
    assert not (project / "deploy" / "profiles" / "own.yaml").exists()


def test_a_name_that_ends_a_line_of_yaml_or_is_no_text_harms_no_profile(
    project: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(project.parent / "photos", name="a\u2028seed: [5\x07.jsonl")
    monkeypatch.setattr("sys.argv", ["vismem", "init", "own", "--data", str(file)])
    run("own", "--data", file)
    assert load_config(project / "params.yaml", "own").seed == 0
    latin = file.rename(file.with_name(os.fsdecode(b"caf\xe9.jsonl")))
    assert r"caf\udce9.jsonl': a name on the way there is not UTF-8" in run("b", "--data", latin, status=1)


@pytest.mark.parametrize("moved", range(3))
def test_what_a_killed_replacement_leaves_the_next_one_takes_away(
    moved: int, project: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, rename, calls = write(project.parent / "photos"), Path.rename, list[Path]()
    run("own", "--data", file)

    def rename_or_die(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) > moved:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_or_die)
        patch.setattr("vismem.init.shutil.rmtree", lambda *_, **__: None)  # a killed process takes nothing away
        run("own", "--data", file, "--seed", 1, "--force", status=130)
    run("own", "--data", file, "--seed", 2, "--force")
    assert load_config(project / "params.yaml", "own").seed == 2
    assert [path.name for path in (project / "data").iterdir()] == ["own"]


def test_a_replacement_that_is_stopped_between_two_renames_puts_the_old_folder_back(
    project: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, rename = write(project.parent / "photos"), Path.rename
    run("own", "--data", file)
    before = (project / "data" / "own" / "train.jsonl").read_bytes()

    def rename_or_stop(path: Path, target: Path) -> Path:
        if path.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_stop)
    run("own", "--data", file, "--seed", 1, "--force", status=130)
    assert (project / "data" / "own" / "train.jsonl").read_bytes() == before
    assert [path.name for path in (project / "data").iterdir()] == ["own"]


def test_a_disk_that_is_full_by_then_and_a_run_at_once_change_nothing(
    project: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(project.parent / "photos")
    run("own", "--data", file)
    before, write_text = {path: path.read_bytes() for path in project.rglob("own*/*")}, files.write_text

    def full(path: Path, text: str) -> None:
        if "own.yaml" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr("vismem.init.write_text", full)
        assert "the disk is full" in run("own", "--data", file, "--seed", 1, "--force", status=1)
    with lock_file(project / "data" / ".own.lock", "it"):
        assert "data/own is in use by process" in run("own", "--data", file, "--seed", 1, "--force", status=1)
    assert len(before) == 4
    assert {path: path.read_bytes() for path in project.rglob("own*/*")} == before
    assert load_config(project / "params.yaml", "own").seed == 0
