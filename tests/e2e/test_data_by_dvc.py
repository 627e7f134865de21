"""The way of data through DVC, run from docs/data.md: added, pushed, trained on, changed, gone back to, found again."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc_project import GIT, SPLITS, DvcProject
from real_stack import running_stack

from vismem.config import parse_config
from vismem.params_file import render_params

ROOT = Path(__file__).parents[2]
SMALL = {
    "prepare": {
        "sources": [{"kind": "jsonl", "path": f"data/scans/{split}.jsonl", "split": split} for split in SPLITS]
    },
    "memory": {"lora_rank": 4, "lora_alpha": 8},
    "grpo": {"batch_size": 4, "max_new_tokens": 24},
    "stage1": {"steps": 1, "group_size": 4, "warm_start": {"steps": 2, "batch_size": 4}},
    "stage2": {"steps": 1, "group_size": 4},
    "evaluate": {"max_new_tokens": 24, "bootstrap": 100},
    "export": {"graphs": False},
}


def test_the_way_of_data_that_the_page_shows(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    (script,) = re.findall(r"^```bash\n(# the whole way\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    shutil.copy(ROOT / ".gitignore", project)
    (project / "params.yaml").write_text(render_params(parse_config(SMALL)))
    data = DvcProject(project)
    data.write("left", rows=8)
    data.run("git", "init", "--quiet", "--initial-branch=main")
    data.run("git", "add", "--all")
    data.run("git", "commit", "--quiet", "--message=VisMem")
    with running_stack(tmp_path_factory.mktemp("stack") / "stack") as stack:
        around = {**os.environ, **GIT, **stack.environment}
        command = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(command, cwd=project, env=around, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        kept = b"".join(stack.objects("dvc/files/md5/").values())
    assert b'"left"' in kept
    assert b'"right"' in kept
    train = (project / "data" / "scans" / "train.jsonl").read_text()
    assert ('"left"' in train, '"right"' in train) == (True, False)
    assert "modified" in done.stdout, "what `dvc diff` says"
    back = done.stdout[done.stdout.rindex("nothing to do: every step is unchanged") :]
    listed, shown = back[: back.index("\n{")], json.loads(back[back.index("\n{") : back.rindex("}") + 1])
    assert re.findall(r"^│ (\d+) ", listed, re.MULTILINE) == ["1"]
    tags = shown["tags"]
    commit = data.run("git", "log", "-1", "--format=%H", "scans-1", "--", "data/scans.dvc").strip()
    assert (tags["data_path"], tags["data_commit"], tags["data_remote"]) == ("data/scans", commit, "s3://vismem/dvc")
    assert tags["data_md5"] in (project / "data" / "scans.dvc").read_text()
    card = (project / "artifacts" / "export" / "README.md").read_text()
    assert f"| data by DVC | `data/scans` at commit {commit[:10]} of {project.name}, md5 {tags['data_md5']}" in card
