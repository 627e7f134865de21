"""`vismem init`: what it says of rows, what it writes, and what it never overwrites."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from init_project import Lines, picture, project, question, run, write

from vismem.config import load_config
from vismem.data.prepare import prepare
from vismem.init import rows

__all__ = ["project", "run"]  # fixtures


def test_the_profile_runs_prepare_on_images_that_stay_where_they_are(project: Path, run: Callable[..., str]) -> None:
    file = write(project.parent / "photos")
    said = run("own", "--data", file)
    config = load_config(project / "params.yaml", "own")
    assert prepare(config, {}, project / "out").startswith("prepared 2 test, 1 validation, 9 train rows")
    assert sorted(path.name for path in (project / "data" / "own").iterdir()) == [
        "init.json",
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]
    assert "12 rows, 12 good" in said
    assert "9 train, 1 validation, 2 test" in said
    assert "vismem repro --profile own" in said


def test_images_inside_the_project_are_named_as_seen_from_its_root(project: Path, run: Callable[..., str]) -> None:
    (project / "data" / "raw").mkdir()
    run("own", "--data", write(project / "data" / "raw"))
    sources = yaml.safe_load((project / "deploy" / "profiles" / "own.yaml").read_text())["prepare"]["sources"]
    assert [source["images"] for source in sources] == ["data/raw"] * 3
    assert [source["path"] for source in sources] == [f"data/own/{s}.jsonl" for s in ("train", "validation", "test")]


def test_files_of_several_folders_go_together_and_a_missing_id_says_where_it_is_from(
    project: Path, run: Callable[..., str]
) -> None:
    for name in ("one", "two"):
        (project.parent / "photos" / name).mkdir()
    first = write(project.parent / "photos" / "one", 3)
    second = project.parent / "photos" / "two" / "mine.jsonl"
    picture(second.parent / "a.png", 70)
    second.write_text(json.dumps(question(0, id=None, image="a.png")) + "\n")
    assert "given to 1 row" in run("own", "--data", first, "--data", second)
    prepare(load_config(project / "params.yaml", "own"), {}, project / "out")
    lines = [line for path in (project / "data" / "own").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert {(row["id"], row["image"]) for row in map(json.loads, lines)} == {
        ("two-mine-1", "two/a.png"),
        *((str(number), f"one/{number}.png") for number in range(3)),
    }


FITS = list(enumerate([("a dog", "a cat"), ("a bird", "a fish")]))


def test_bad_rows_are_counted_and_named_and_the_good_ones_kept(project: Path, run: Callable[..., str]) -> None:
    (project.parent / "photos" / "text.png").write_text("no image")
    more: Lines = [
        '{"id": 1,',
        question(20, image="gone.png"),
        question(21, image="text.png"),
        question(22, image="0.png", answer=None),
        question(0, image="1.png", prompt="where is it?"),
        question(23, image="0.png"),
        question(24, image="1.png", answer="elsewhere"),
        question(25, image="2.png", prompt="how many?", answer="3", choices=["1", "2"]),
        question(26, image="../photos/../project/params.yaml"),
        *(question(30 + n, image="3.png", prompt="which fits?", answer=a, choices=[a, b]) for n, (a, b) in FITS),
    ]
    file = write(project.parent / "photos", 12, more)
    said = run("own", "--data", os.path.relpath(file))
    assert "23 rows, 14 good, 6 bad, 3 asked before" in said, "other choices make another question"
    assert "  answers    12 text, 2 choice; 'top left' is the most frequent" in said
    for reason in (
        "../photos/mine.jsonl, line 13: broken JSON",
        "../photos/mine.jsonl, line 14: no image file ../photos/gone.png",
        "line 15: image 1 of 1: cannot identify image file",
        "line 16: no 'answer'",
        "line 17: the id '0' is that of ../photos/mine.jsonl, line 1",
        "line 18: the same question about the same images as ../photos/mine.jsonl, line 1",
        "line 19: the same question about the same images as ../photos/mine.jsonl, line 2, with another answer",
        "line 20: the answer '3' is none of the choices",
        "and 1 more, all in data/own/init.json",
    ):
        assert reason in said
    assert len(json.loads((project / "data" / "own" / "init.json").read_text())["left_out"]) == 9


@pytest.mark.parametrize(
    ("lines", "reason"),
    [("", "no good row in FILE: no rows at all"), ('[{"id": 1}]\n', "no good row in FILE: FILE, line 1: an object")],
)
def test_a_file_without_a_good_row_is_refused(project: Path, run: Callable[..., str], lines: str, reason: str) -> None:
    file = project.parent / "photos" / "mine.jsonl"
    file.write_text(lines)
    assert reason.replace("FILE", str(file)) in run("own", "--data", file, status=1)
    assert list((project / "data").iterdir()) == []


def test_a_folder_a_table_and_a_file_that_is_not_there_are_refused(project: Path, run: Callable[..., str]) -> None:
    file = write(project.parent / "photos")
    assert "is a folder: name the .jsonl file in it; it has mine.jsonl" in run("own", "--data", file.parent, status=1)
    assert "no file gone.jsonl" in run("own", "--data", "gone.jsonl", status=1)
    assert "takes JSON lines" in run("own", "--data", "MMStar.tsv", status=1)
    table = project / "train.jsonl"  # whatever its name
    table.write_bytes(b"PAR1\x15\x04\n\x15" * 100)
    assert "train.jsonl is a Parquet table" in run("own", "--data", table, status=1)


def test_a_file_of_something_else_is_not_read_to_its_end(
    project: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "HOPELESS", 20)
    file = write(project.parent / "photos", 12, ["what,where"] * 40)
    assert "52 rows, 12 good, 40 bad" in run("own", "--data", file), "the first ones are good"
    file.write_text("what,where\n" * 40)
    said = run("other", "--data", file, status=1)
    assert f"none of the first 20 rows is good: {file}, line 1: broken JSON" in said


def test_nothing_that_is_there_is_overwritten_without_force_and_only_its_own_with_it(
    project: Path, run: Callable[..., str]
) -> None:
    file = write(project.parent / "photos")
    run("own", "--data", file)
    profile = project / "deploy" / "profiles" / "own.yaml"
    before = profile.read_text()
    assert "own.yaml is there already: choose another name, or replace it with --force" in run(
        "own", "--data", file, "--seed", 1, status=1
    )
    assert profile.read_text() == before
    run("own", "--data", file, "--seed", 1, "--force")
    assert load_config(project / "params.yaml", "own").seed == 1
    theirs = (project / "deploy" / "profiles" / "smoke.yaml").read_text()
    (project / "data" / "photos").mkdir()
    for name in ("smoke", "photos"):
        assert "not of `vismem init`: choose another name" in run(name, "--data", file, "--force", status=1)
    assert (project / "deploy" / "profiles" / "smoke.yaml").read_text() == theirs
    assert "is no name for a profile" in run("../own", "--data", file, status=1)
    inside = project / "data" / "own" / "train.jsonl"
    assert "lies in the folder that `vismem init` would write" in run("own", "--data", inside, "--force", status=1)


def test_what_else_a_user_put_into_the_folder_is_never_removed(project: Path, run: Callable[..., str]) -> None:
    file = write(project.parent / "photos")
    run("own", "--data", file)
    pictures = (project.parent / "photos").rename(project / "data" / "own" / "photos")
    lines = (pictures / file.name).rename(project.parent / file.name)
    given = ("own", "--data", lines, "--images", pictures, "--force")
    assert "data/own also holds photos, which would be lost: move that" in run(*given, status=1)
    assert len(list(pictures.glob("*.png"))) == 12
    pictures.rename(project.parent / "photos")
    run("own", "--data", lines, "--images", project.parent / "photos", "--force")


def test_outside_a_project_it_writes_nothing(
    project: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(project.parent / "photos")
    monkeypatch.chdir(file.parent)
    before = sorted(file.parent.rglob("*"))
    assert "no parameter file params.yaml: run in the project's root" in run("own", "--data", file, status=1)
    assert sorted(file.parent.rglob("*")) == before


def test_an_id_of_zero_is_an_id(project: Path, run: Callable[..., str]) -> None:
    file = write(project.parent / "photos", 0, [question(n, id=n, image=f"{n}.png") for n in range(12)])
    for n in range(12):
        picture(file.parent / f"{n}.png", n)
    assert "that had none" not in run("own", "--data", file)
    lines = [line for path in (project / "data" / "own").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(int(json.loads(line)["id"]) for line in lines) == [*range(12)]


def test_a_run_that_is_killed_leaves_nothing_half(
    project: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(project.parent / "photos")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run("own", "--data", file, status=130)
    assert list((project / "data").iterdir()) == []
    assert not (project / "deploy" / "profiles" / "own.yaml").exists()
    run("own", "--data", file)


def test_given_splits_are_taken_as_they_are(project: Path, run: Callable[..., str]) -> None:
    folder = project.parent / "photos"
    data = write(folder)
    test, validation = folder / "test.jsonl", folder / "validation.jsonl"
    for number in (20, 21, 22):
        picture(folder / f"{number}.png", number)
    tested = [question(20), question(21), question(30, image="3.png", prompt="how many?"), question(31, image="4.png")]
    test.write_text("".join(json.dumps(line) + "\n" for line in tested))
    validation.write_text(json.dumps(question(22)))
    said = run("own", "--data", data, "--test", test, "--validation", validation)
    assert "10 train, 1 validation, 4 test: as the data names them" in said
    assert "17 rows, 15 good, 1 asked before, 1 with an image of another split" in said
    assert f"{data}, line 4: left out of train, its image or group is in test" in said
    assert f"{data}, line 5: the same question about the same images as {test}, line 4" in said


def test_many_test_questions_about_few_images_are_said_to_be_too_few(project: Path, run: Callable[..., str]) -> None:
    asked = [question(n, image=f"{n % 6}.png", prompt=f"question {n}?", split="test") for n in range(100, 300)]
    said = " ".join(run("own", "--data", write(project.parent / "photos", more=asked)).split())
    assert "the 200 test questions are about 6 images or groups, and those count: the gate asks for 40" in said
    assert "too few to show" not in said
