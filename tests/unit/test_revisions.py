"""Data that DVC keeps: what is fetched of a revision, what is recorded of it, and what is said where that cannot be."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_project import SPLITS, DvcProject

from vismem.config import Config, DvcSource, parse_config, resolve
from vismem.data.dvc_source import fetch, find, md5_here
from vismem.data.prepare import prepare
from vismem.data.sample import read_samples
from vismem.data.source_files import RECORD, record_outside
from vismem.errors import UserError
from vismem.kubeflow.parameters import configure
from vismem.kubeflow.results import describe
from vismem.workspace import rebase

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two revisions of its data, v1 and v2; `main` is at v2."""
    folder = tmp_path_factory.mktemp("made")
    project = DvcProject(folder / "project", "../remote", {"DVC_SITE_CACHE_DIR": str(folder / "site")})
    project.commit("left", "v1")
    image = base64.b64encode((project.root / "data" / "scans" / "images" / "train-0.png").read_bytes()).decode()
    line = {"id": "1", "image": f"data:image/png;base64,{image}", "prompt": "Which?", "answer": "one"}
    (project.root / "data" / "one.jsonl").write_text(json.dumps(line))
    project.run("dvc", "add", "--quiet", "data/one.jsonl")
    project.commit("right", "v2")
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DvcProject:
    """A copy of it without what DVC has cached, so that data comes from its remote; the working folder is beside it."""
    shutil.copytree(made, tmp_path / "made", ignore=shutil.ignore_patterns("site", "cache"))
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    return DvcProject(tmp_path / "made" / "project")


def prepared(out: Path, *sources: dict[str, Any]) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    prepare(parse_config({"prepare": {"sources": sources}}), {}, out)
    return dict(json.loads((out / "revisions.json").read_text()))


def cached() -> list[str]:
    return sorted(path.name for path in cache().iterdir() if path.is_dir()) if cache().is_dir() else []


def cache() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"]) / "vismem" / "dvc"


def rows(out: Path) -> set[str]:
    return {sample.answer for split in SPLITS for sample in read_samples(out / split)}


def parsed(project: DvcProject, **changed: Any) -> Config:
    return parse_config({"prepare": {"sources": [project.source(**changed)]}})


def source(project: DvcProject, **changed: Any) -> DvcSource:
    return DvcSource(**project.source(**changed))


def test_a_revision_s_rows_are_those_of_its_files_and_its_record_says_where_they_are(
    project: DvcProject, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (first,) = prepared(out, project.source())["revisions"]
    assert rows(out) == {"left"}
    assert describe("prepare", out)[0]["data_md5"] == first["md5"]
    old = (out / "train" / "part-00000.parquet").read_bytes()
    commit = project.run("git", "rev-parse", "v1").strip()
    tracked = yaml.safe_load(project.run("git", "show", "v1:data/scans.dvc"))["outs"][0]["md5"]
    assert first == {
        "repo": "project",
        "rev": "v1",
        "commit": commit,
        "path": "data/scans",
        "md5": tracked,
        "remote": str(tmp_path / "made" / "remote"),
    }
    (second,) = prepared(out, project.source(rev="main"))["revisions"]
    assert rows(out) == {"right"}
    assert second["commit"] == project.run("git", "rev-parse", "main").strip()
    assert cached() == sorted([first["md5"], second["md5"]])
    prepared(out, project.source(rev=commit[:8]))
    assert (out / "train" / "part-00000.parquet").read_bytes() == old, "back at the old revision, the same bytes"
    project.run("git", "diff", "--quiet")
    assert project.run("git", "status", "--porcelain") == "", "the project itself stays as it is"


def test_a_single_file_is_fetched_alone(project: DvcProject, tmp_path: Path) -> None:
    inner = [{"kind": "jsonl", "path": "data/one.jsonl", "split": "train"}]
    found = prepared(tmp_path / "out", project.source(rev="v2", path="data/one.jsonl", sources=inner))
    assert rows(tmp_path / "out") == {"one"}
    (md5,) = cached()
    assert found["revisions"][0]["md5"] == md5
    assert [path.name for path in (Path(os.environ["XDG_CACHE_HOME"]) / "vismem" / "dvc" / md5).iterdir()] == [
        "one.jsonl"
    ]


def test_a_branch_that_moves_is_seen_by_dvc_s_pipeline_and_by_the_cluster_s_cache_through_the_md5(
    project: DvcProject, tmp_path: Path
) -> None:
    def seen() -> tuple[str, Any]:
        config = parsed(project, rev="main")
        record_outside(config)
        prepare_parameters = configure("", {"prepare": config.prepare.model_dump()}, str(tmp_path / "page"), {}, 0)[1]
        return RECORD.read_text(), prepare_parameters

    before = seen()
    record, parameters = before
    assert find(source(project, rev="v2")).md5 in record
    assert parameters["prepare"]["sources"][0]["md5"] in record
    project.run("git", "commit", "--quiet", "--allow-empty", "--message=Nothing of the data")
    assert seen() == before, "the same data is not prepared again"
    project.run("git", "reset", "--quiet", "--hard", "v1")
    record, parameters = seen()
    assert find(source(project, rev="v1")).md5 in record
    assert parameters["prepare"]["sources"][0]["md5"] in record
    moved = parse_config({key: value for key, value in before[1].items() if key != "made_from"})
    with pytest.raises(UserError, match=r"data/scans at main of .*: its md5 is \w+\.dir, and \w+\.dir is asked for"):
        prepare(moved, {}, tmp_path)


def test_what_was_fetched_once_is_not_fetched_again_and_a_full_commit_needs_no_repository(
    project: DvcProject, tmp_path: Path
) -> None:
    commit = project.run("git", "rev-parse", "v1").strip()
    first, place = fetch(source(project))
    (tmp_path / "made" / "remote").rename(tmp_path / "away")
    project.run("git", "tag", "same", commit)
    again, same = fetch(source(project, rev="same"))
    assert (again.md5, same) == (first.md5, place)
    known = first.model_copy(update={"rev": commit})
    (note,) = (tmp_path / "XDG_CACHE_HOME").glob("vismem/dvc/*.json")
    for damaged in ("{}", "[]", "{"):
        note.write_text(damaged)
        assert fetch(source(project, rev=commit)) == (known, place), "found anew"
    project.root.rename(tmp_path / "gone")
    assert fetch(source(project, rev=commit)) == (known, place)
    assert find(source(project, rev=commit)) == known
    for config in (parsed(project, rev="main"), parsed(project, rev=commit, md5="0" * 32)):
        with pytest.raises(UserError, match="check the address, the network and Git's credentials"):
            prepare(config, {}, tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rev": "v9"}, r"data/scans at v9 of \S+: unknown Git revision 'v9': name a commit, tag or branch"),
        ({"remote": "other"}, "remote 'other' doesn't exist"),
        ({"path": "data"}, "DVC does not track it there as a whole"),
        ({"path": "data/scans/images"}, "DVC does not track it there as a whole"),
        ({"path": "data/none"}, "there is no such file or folder in that revision"),
        ({"repo": "https://ann:secret@127.0.0.1:9/data.git"}, r"https://\*\*\*@127.*refused: check the address"),
    ],
)
def test_what_is_not_there_is_one_line_and_nothing_is_left(
    project: DvcProject, changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = changed.get("path", "data/scans")
    inner = [{"kind": "jsonl", "path": f"{path}/train.jsonl", "split": "train"}]
    with pytest.raises(UserError, match=said) as raised:
        prepared(tmp_path / "out", project.source(**changed, sources=inner))
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)
    assert cached() == []
    assert list((tmp_path / "out").iterdir()) == []


def test_data_that_was_not_pushed_or_was_damaged_is_not_taken(project: DvcProject, tmp_path: Path) -> None:
    remote = tmp_path / "made" / "remote"
    files = [path for path in (remote / "files" / "md5").rglob("*") if path.is_file()]
    for file in files:
        if b"left" in file.read_bytes():
            file.chmod(0o600)
            file.write_bytes(b"other" + file.read_bytes())
    with pytest.raises(UserError, match=r"DVC fetched \w+\.dir, not \w+\.dir: the remote's files are damaged"):
        fetch(source(project))
    assert cached() == []
    shutil.rmtree(remote)
    with pytest.raises(UserError, match=r"data/scans at v1 of .*: `dvc push` it to the remote"):
        fetch(source(project))
    assert cached() == []


def test_a_fetch_that_was_killed_leaves_nothing_that_the_next_one_takes(project: DvcProject, tmp_path: Path) -> None:
    program = (
        "import json, os, signal, sys\n"
        "import dvc_data.hashfile.build as made\n"
        "from vismem.config import DvcSource\n"
        "from vismem.data.dvc_source import fetch\n"
        "made.build = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "fetch(DvcSource(**json.loads(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, json.dumps(project.source())]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    (partial,) = cached()
    assert partial.endswith(".partial")
    (cache() / partial / "scans" / "train.jsonl").write_text("broken")
    prepared(tmp_path / "out", project.source())
    assert rows(tmp_path / "out") == {"left"}
    assert cached() == [partial.removesuffix(".partial")]


def test_the_project_s_own_data_is_recorded_where_it_is_as_committed(
    project: DvcProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = project.source()["sources"]
    workspace = project.root / "runs" / "smoke"
    workspace.mkdir(parents=True)
    (workspace / "data").symlink_to(Path("..") / ".." / "data")
    commit, md5 = project.run("git", "rev-parse", "v2").strip(), find(source(project, rev="v2")).md5
    for folder in (project.root, workspace):
        monkeypatch.chdir(folder)
        (found,) = prepared(tmp_path / "out", *inner)["revisions"]
        assert (found["rev"], found["commit"], found["path"], found["md5"]) == ("", commit, "data/scans", md5)
        project.run("git", "commit", "--quiet", "--allow-empty", "--message=Only code")
    assert capsys.readouterr().out == ""
    project.write("up")
    for _ in ("changed", "added"):
        assert prepared(tmp_path / "out", *inner)["revisions"] == []
        said = "data/scans is not what data/scans.dvc of the last commit says: `dvc add` and commit, or no model names "
        assert capsys.readouterr().out == f"{said}its data\n"
        project.run("dvc", "add", "--quiet", "data/scans")
    project.run("git", "commit", "--quiet", "--all", "--message=up")
    (found,) = prepared(tmp_path / "out", *inner)["revisions"]
    assert found["md5"] != md5


def test_a_revision_of_this_project_is_found_by_any_of_its_names(
    project: DvcProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    md5 = find(source(project)).md5
    project.run("git", "branch", "old", "v1")
    for name in ("v1", "old", project.run("git", "rev-parse", "v1").strip()):
        assert md5_here(name, ["data/scans", "data/none"]) == {md5}
    monkeypatch.chdir(tmp_path)
    assert md5_here("v1", ["data/scans"]) == set()


def test_what_is_read_must_be_fetched_and_a_profile_s_workspace_finds_the_same_repository(tmp_path: Path) -> None:
    inner = {"kind": "jsonl", "path": "data/other/train.jsonl", "split": "train"}
    values = {"kind": "dvc", "repo": ".", "rev": "v1", "path": "data/scans"}
    with pytest.raises(UserError, match=r"data/other/train\.jsonl is not in data/scans, which is all that is fetched"):
        parse_config({"prepare": {"sources": [{**values, "sources": [inner]}]}})
    inner["path"] = "scans/train.jsonl"
    values["path"] = "scans"
    config = parse_config({"prepare": {"sources": [{**values, "sources": [inner]}]}})
    (moved,) = rebase(config, tmp_path, tmp_path / "runs" / "smoke").prepare.sources
    assert moved == config.prepare.sources[0].model_copy(update={"repo": "../.."})
    url = {**values, "repo": "https://example.com/data.git", "sources": [inner]}
    config = parse_config({"prepare": {"sources": [url]}})
    assert rebase(config, tmp_path, tmp_path / "runs" / "smoke").prepare == config.prepare


def test_the_sources_that_the_pages_name_for_a_cluster_are_parameters() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    (page,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    (submitted,) = resolve("qwen2_5_vl_7b", json.loads(text)).prepare.sources
    assert isinstance(submitted, DvcSource)
    assert parse_config(yaml.safe_load(page)).prepare.sources == (submitted,)
