"""Data by DVC on the real S3 server: pushed, fetched by revision, changed, gone back to; and what goes wrong there."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dvc_project import DvcProject
from real_stack import Stack

from vismem.cli import main
from vismem.data.sample import read_samples

ROOT = Path(__file__).parents[2]
DEAD = "http://127.0.0.1:9"  # the discard port: nobody listens


class Client:
    """A project whose data was pushed, and another folder in which `vismem prepare` fetches it by the project's URL."""

    def __init__(self, folder: Path, stack: Stack) -> None:
        self.root, self.cache = folder / "client", folder / "xdg" / "vismem" / "dvc"
        self.root.mkdir()
        self.project = DvcProject(folder / "project", f"s3://vismem/{folder.name}", stack.environment)
        self.project.commit("left", "v1")
        shutil.rmtree(self.project.root / ".dvc" / "cache")

    def ask_for(self, rev: str, **changed: object) -> None:
        source = self.project.source(repo=self.project.root.as_uri(), rev=rev, **changed)
        (self.root / "params.yaml").write_text(json.dumps({"prepare": {"sources": [source]}}))

    def prepare(self, rev: str, **changed: object) -> int:
        self.ask_for(rev, **changed)
        return main(["prepare"])

    def shards(self) -> dict[str, bytes]:
        folder = self.root / "artifacts" / "prepare"
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}

    def answers(self) -> set[str]:
        return {sample.answer for sample in read_samples(self.root / "artifacts" / "prepare" / "train")}


@pytest.fixture
def client(stack: Stack, anywhere: pytest.MonkeyPatch, tmp_path: Path) -> Client:
    for name, value in stack.environment.items():
        anywhere.setenv(name, value)
    anywhere.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    anywhere.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    anywhere.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "global"))
    client = Client(tmp_path, stack)
    anywhere.chdir(client.root)
    return client


def test_data_comes_back_from_s3_by_its_revision_byte_for_byte(client: Client) -> None:
    assert client.prepare("v1") == 0
    first = client.shards()
    assert client.answers() == {"left"}
    client.project.commit("right", "v2")
    shutil.rmtree(client.project.root / ".dvc" / "cache")
    shutil.rmtree(client.cache)
    assert client.prepare("v2") == 0
    assert client.answers() == {"right"}
    shutil.rmtree(client.cache)
    assert client.prepare("v1") == 0
    assert client.shards() == first
    client.project.run("git", "checkout", "--quiet", "v1")  # the project's own way back
    client.project.run("dvc", "pull", "--quiet", "--force")  # DVC has no copy here of what it replaces
    assert '"left"' in (client.project.root / "data" / "scans" / "train.jsonl").read_text()


WRONG = (  # environment, revision, what else is asked for, what is said
    ({}, "v9", {}, "unknown Git revision 'v9': name a commit, tag or branch that was pushed"),
    ({}, "v1", {"remote": "other"}, "remote 'other' doesn't exist"),
    ({}, "v1", {"remote": "empty"}, "`dvc push` it to the remote from where it was added, or name another"),
    ({}, "none", {}, "the repository has no default DVC remote"),
    ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "v1", {}, "Forbidden: the DVC remote takes no such keys"),
    ({"AWS_ENDPOINT_URL_S3": DEAD}, "v1", {}, f'Could not connect to the endpoint URL: "{DEAD}/vismem"'),
)


def test_what_cannot_be_fetched_is_one_line_and_the_old_output_stays(
    client: Client, anywhere: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    project = client.project
    project.run("dvc", "remote", "add", "empty", "s3://vismem/empty")
    project.run("git", "commit", "--quiet", "--all", "--message=Another remote")
    project.run("git", "tag", "--force", "v1")
    project.run("dvc", "config", "--unset", "core.remote")
    project.run("git", "commit", "--quiet", "--all", "--message=No default")
    project.run("git", "tag", "none")
    assert client.prepare("v1") == 0
    before = client.shards()
    shutil.rmtree(client.cache)
    for environment, rev, changed, said in WRONG:
        capfd.readouterr()
        with anywhere.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert client.prepare(rev, **changed) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"vismem prepare: prepare.sources dvc: data/scans at {rev} of {project.root.as_uri()}: ")
        assert said in line
        assert client.shards() == before
        assert not list(client.cache.glob("*.dir*/*"))


def test_a_fetch_that_is_killed_leaves_nothing_half_written_and_is_repeated(client: Client) -> None:
    client.ask_for("v1")
    program = (
        "import os, signal, sys\n"
        "from dvc_data.fs import DataFileSystem\n"
        "get, count = DataFileSystem.get_file, []\n"
        "def killed(*given, **named):\n"
        "    count.append(0)\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if len(count) > 4 else get(*given, **named)\n"
        "DataFileSystem.get_file = killed\n"
        "from vismem.cli import main\n"
        "main(['prepare'])"
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (client.root / "artifacts" / "prepare").exists()
    (partial,) = client.cache.glob("*.dir*/")
    assert partial.name.endswith(".partial")
    assert client.prepare("v1") == 0
    assert client.answers() == {"left"}
    assert not partial.exists()
