"""What a cloned repository may not set of DVC: it would have it run commands, or read files, of this machine."""

from pathlib import Path

import pytest
from dvc_project import DvcProject

from vismem.config import DvcPath
from vismem.data.dvc_source import find
from vismem.errors import UserError

CONFIG = (
    "[core]\n    remote = storage\n['remote \"storage\"']\n    url = s3://bucket/dvc\n    endpointurl = http://s3\n"
)
EVIL = "['remote \"evil\"']\n    url = webdavs://h/\n"
TRACKED = "outs:\n- {md5: c0ffee.dir, path: scans, hash: md5}\n"
IMPORTED = "deps:\n- {path: data, repo: {url: 'https://127.0.0.1:9/a.git', rev_lock: abc}}\n"
OTHER = "deps:\n- {path: s3://b/x, fs_config: {configpath: a}}\nouts:\n- {path: other}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DvcProject:
    """A repository with an honest remote and a folder in DVC."""
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    (root / "data").mkdir()
    made = DvcProject(root)
    made.run("git", "init", "--quiet", "--initial-branch=main")
    commit(made, {".dvc/config": CONFIG, "data/scans.dvc": TRACKED})
    return made


def commit(project: DvcProject, files: dict[str, str]) -> None:
    for name, text in files.items():
        (project.root / name).write_text(text)
    project.run("git", "add", "--force", *files)
    project.run("git", "commit", "--quiet", "--message=settings")


def cloned(project: DvcProject) -> DvcPath:
    return DvcPath(repo=f"file://{project.root}", rev="main", path=Path("data/scans"))


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (".dvc/config", f"{CONFIG}    profile = p\n    configpath = a.ini\n", "sets configpath, profile of DVC, which"),
        (".dvc/config.local", f"{EVIL}    bearer_token_command = id\n", "sets bearer_token_command of DVC"),
        (".dvc/config", CONFIG.replace("]\n", "]\n    site_cache_dir = data\n", 1), r"site_cache_dir"),
        ("other.dvc", OTHER, "sets configpath of DVC"),
        ("data/scans.dvc", IMPORTED + TRACKED, "imported there from another repository: name that one"),
    ],
)
def test_settings_that_reach_this_machine_are_refused(project: DvcProject, file: str, text: str, said: str) -> None:
    assert find(cloned(project)).md5 == "c0ffee.dir"
    commit(project, {file: text})
    with pytest.raises(UserError, match=said):
        find(cloned(project))


def test_the_same_settings_of_one_s_own_folder_are_taken(project: DvcProject) -> None:
    commit(project, {".dvc/config": f"{CONFIG}    profile = p\n"})
    assert find(cloned(project).model_copy(update={"repo": str(project.root)})).md5 == "c0ffee.dir"


def test_a_repository_without_dvc_is_one_line(tmp_path: Path) -> None:
    made = DvcProject(tmp_path)
    made.run("git", "init", "--quiet", "--initial-branch=main")
    commit(made, {"README": "nothing"})
    with pytest.raises(UserError, match="there is no such file or folder in that revision"):
        find(cloned(made))
