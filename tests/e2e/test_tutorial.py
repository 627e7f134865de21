"""The tutorial for a user's own data, run word by word in a fresh copy of the project: it prints what it shows."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAST = "## A large model on a GPU"  # what follows needs one
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DECIMAL = r"[-+]?\d+\.\d+(e-\d+)?"  # scores and times: training on another CPU rounds otherwise


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
