"""A project whose questions DVC keeps: a Git repository, a remote, and what people do with them."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

SPLITS = ("train", "validation", "test")
GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b.c"}
GIT |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.c"}


class DvcProject:
    """A Git repository with DVC in it, and `data/scans`: JSON lines of each split with their images."""

    def __init__(self, root: Path, remote: str = "", environment: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.environment = {"DVC_NO_ANALYTICS": "1", **(environment or {})}
        if not remote:  # it is there
            return
        root.mkdir(parents=True, exist_ok=True)
        self.run("git", "init", "--quiet", "--initial-branch=main")
        self.run("dvc", "init", "--quiet")
        self.run("dvc", "remote", "add", "--default", "--quiet", "storage", remote)

    def run(self, *command: str, status: int = 0) -> str:
        """What a command says that ends with that status."""
        program = [sys.executable, "-m", "dvc", *command[1:]] if command[0] == "dvc" else list(command)
        around = {**os.environ, **GIT, **self.environment}
        done = subprocess.run(program, cwd=self.root, env=around, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def write(self, answer: str, rows: int = 2) -> None:
        """Questions in `data/scans`, all with that answer."""
        folder = self.root / "data" / "scans"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for number, split in enumerate(SPLITS):
            lines = []
            for row in range(rows):
                file = io.BytesIO()
                Image.new("RGB", (32, 32), (number, row, len(answer))).save(file, "PNG")
                (folder / "images" / f"{split}-{row}.png").write_bytes(file.getvalue())
                values = {"id": f"{split}-{row}", "image": f"images/{split}-{row}.png", "prompt": "Which?"}
                lines.append(json.dumps({**values, "answer": answer}) + "\n")
            (folder / f"{split}.jsonl").write_text("".join(lines))

    def commit(self, answer: str, tag: str) -> str:
        """Change the data, add it to DVC, commit, tag, and push it; returns the commit."""
        self.write(answer)
        self.run("dvc", "add", "--quiet", "data/scans")
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", tag)
        self.run("git", "tag", tag)
        self.run("dvc", "push", "--quiet")
        return self.run("git", "rev-parse", "HEAD").strip()

    def source(self, **changed: Any) -> dict[str, Any]:
        """The parameters of a source of this project's data."""
        inner = [{"kind": "jsonl", "path": f"data/scans/{split}.jsonl", "split": split} for split in SPLITS]
        values = {"kind": "dvc", "repo": str(self.root), "rev": "v1", "path": "data/scans", "sources": inner}
        return {**values, **changed}
