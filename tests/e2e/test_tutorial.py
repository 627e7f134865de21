"""The tutorial for a user's own data, run word by word in a fresh copy of the project: it prints what it shows."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vismem.serving.environment import DEFAULT_PYTHON, VARIABLE

ROOT = Path(__file__).parents[2]
COPIED = ("vismem", "assets/tiny-vlm", "deploy/profiles", "deploy/triton", ".dvc/config", ".dvcignore", "dvc.yaml")
LAST = "## A large model on a GPU"  # what follows needs one
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DECIMAL = r"[-+]?\d+\.\d+(e-\d+)?"  # scores and times: training on another CPU rounds otherwise


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what a user has cloned, with both environments."""
    for name in (*COPIED, "params.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    serving = Path(os.environ.get(VARIABLE, DEFAULT_PYTHON))
    if not serving.exists():
        pytest.fail(f"{serving} is missing: run `make serving`")
    _environment(tmp_path / ".venv")
    (tmp_path / ".venv-serving").symlink_to(serving.parents[1])
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path.parent / "site"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path.parent / "global"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def _environment(folder: Path) -> None:
    """A second face of this environment, whose `vismem` has it for its own: it prints paths of the copy."""
    (folder / "bin").mkdir(parents=True)
    for file in Path(sys.prefix).iterdir():
        if file.name != "bin":
            (folder / file.name).symlink_to(file)
    for file in Path(sys.prefix, "bin").iterdir():
        (folder / "bin" / file.name).symlink_to(file)
    script = folder / "bin" / "vismem"
    lines = script.read_text().splitlines(keepends=True)
    script.unlink()
    script.write_text(f"#!{folder / 'bin' / 'python'}\n" + "".join(lines[1:]))
    script.chmod(0o755)


def blocks() -> Iterator[tuple[str, str]]:
    """Language and text of the page's blocks, as far as they run here."""
    text = (ROOT / "docs" / "tutorial.md").read_text()
    assert LAST in text
    yield from FENCE.findall(text.partition(LAST)[0])


def test_the_tutorial_prints_what_it_shows(project: Path) -> None:
    printed, seen = "", 0
    for language, body in blocks():
        if language == "python":
            (project / body.splitlines()[0].removeprefix("# ")).write_text(body)
        elif language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", body]
            done = subprocess.run(
                command, cwd=project, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
            )
            printed = done.stdout
            assert done.returncode == 0, printed
        else:
            seen += 1
            assert shows(body, printed), f"the page shows\n{body}\nand what is printed is\n{printed}"
    assert seen >= 6


def shows(page: str, printed: str) -> bool:
    """Whether a block of the page is what was printed: `...` is anything, a decimal any decimal, a memory any kind.

    What the model says before its answer may differ too.
    """
    lines = []
    for line in page.splitlines():
        if line == "...":
            lines.append(r"(?:.*\n)*?")
            continue
        plain = re.sub(r"⟨\w+⟩.*?answer:", "SAID", line)
        plain = re.sub(DECIMAL, "DECIMAL", plain)
        pattern = re.escape(plain).replace(r"\.\.\.", ".*").replace("SAID", ".*answer:").replace("DECIMAL", DECIMAL)
        lines.append(f"{pattern} *\n")
    return re.fullmatch("".join(lines), printed) is not None


def test_a_page_that_shows_something_else_is_noticed() -> None:
    printed = "one 1.5 %\ntwo\nthree 3 rows, all\n"
    assert shows("one 2.25 %\n...\nthree ...\n", printed)
    assert not shows("one 1.5 %\nthree 3 rows, all\n", printed)
    assert not shows("one 1.5 %\n...\nthree 4 rows, ...\n", printed)
    assert not shows("one 1.5 %\ntwo\n", printed)
    assert shows("⟨long⟩red: star. answer: top\n", "⟨short⟩red. answer: top\n")
    assert not shows("⟨long⟩red: star. answer: top\n", "⟨short⟩red. answer: left\n")
