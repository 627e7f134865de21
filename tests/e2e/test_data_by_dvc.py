"""The way of data through DVC, run from docs/data.md: added, pushed, trained on, changed, gone back to, found again."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc_project import GIT, SPLITS, DvcProject
from real_stack import running_stack

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
    "export": {"parity_items": 2},
    "registry": {"model_name": "scans"},
}


def test_the_way_of_data_that_the_page_shows(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    (script,) = re.findall(r"^```bash\n(# the whole way\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    shutil.copy(ROOT / ".gitignore", project)
    (project / "deploy" / "profiles" / "scans.yaml").write_text(yaml.safe_dump(SMALL))
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
    print(done.stdout)
    assert json.loads(done.stdout[done.stdout.rindex("\n{") :])["version"] == "1"
