"""The documentation: the site builds offline, links lead somewhere, and the commands that pages name exist."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vismem.cli import build_parser
from vismem.config import Config, Section
from vismem.steps import STEPS

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?(?:\w+=\S* )*(?:\.venv/bin/)?(vismem|make) ([a-z][\w-]*)(.*)$")


def pages() -> list[Path]:
    """Every Markdown file of the repository, except the history, whose commands may be gone."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.splitlines() if name != "CHANGELOG.md" and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_and_loads_nothing_from_the_network(site: Path) -> None:
    built = sorted(site.rglob("*.html"))
    assert len(built) > 20
    for page in built:
        loaded = re.findall(
            r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?(https?://[^\s\"'>]+)", page.read_text()
        )
        assert loaded == [], page


def test_the_site_explains_every_parameter_and_every_command(site: Path) -> None:
    parameters, commands = (site / "parameters.html").read_text(), (site / "command-line.html").read_text()
    assert {name for name in _descriptions(Config()) if f"<code>{name}</code>" not in parameters} == set()
    assert {name for name in _commands() if f'id="{name}"' not in commands} == set()


def _descriptions(section: Section) -> Iterator[str]:
    for name, field in type(section).by_key().items():
        if field.description:
            yield name
    for _, value in section:
        if isinstance(value, Section):
            yield from _descriptions(value)


def test_the_steps_on_the_first_page_are_those_of_the_pipeline() -> None:
    text = (ROOT / "docs" / "index.md").read_text()
    steps = [step.name for step in STEPS]
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == steps


def test_contributors_find_every_module_and_folder_of_the_library() -> None:
    text, library = (ROOT / "CONTRIBUTING.md").read_text(), ROOT / "vismem"
    modules = {f"`{file.name}`" for file in library.glob("[!_]*.py")}
    folders = {f"`vismem/{file.parent.name}/`" for file in library.glob("*/__init__.py")}
    assert {name for name in modules | folders if name not in text} == set()


def test_relative_links_lead_to_files() -> None:
    found = []
    for page in pages():
        for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", FENCE.sub("", page.read_text())):
            if not (page.parent / link).exists():
                found.append(f"{page.relative_to(ROOT)}: {link}")
    assert found == []


def test_commands_that_pages_name_exist() -> None:
    commands, targets = _commands(), set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found, seen = [], 0
    for page in pages():
        for program, name, rest in _invocations(page.read_text()):
            seen += 1
            problem = _problem(commands[name], rest) if program == "vismem" and name in commands else None
            if problem or name not in (commands if program == "vismem" else targets):
                found.append(f"{page.relative_to(ROOT)}: {program} {name}{problem or ''}")
    assert found == []
    assert seen > 60


def _commands() -> dict[str, argparse.ArgumentParser]:
    actions = build_parser()._actions
    choices = next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))
    return dict(choices)


def _invocations(text: str) -> Iterator[tuple[str, str, str]]:
    """Program, command and the rest of every `vismem ...` and `make ...` in code."""
    blocks = [body for _, body in FENCE.findall(text)]
    lines = [line.strip() for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    lines += [" ".join(body.split()) for _, body in SPAN.findall(FENCE.sub("", text))]
    for line in lines:
        if match := COMMAND.match(line):
            yield match.group(1), match.group(2), match.group(3)


def _problem(command: argparse.ArgumentParser, rest: str) -> str | None:
    """What is wrong with the options or the choice that a page gives a command; nothing if the command has them."""
    words = shlex.split(rest.replace("[", " ").replace("]", " ").replace("...", ""), comments=True)
    known = command._option_string_actions
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    if unknown := [option for option in options if option not in known and not command.prog.endswith(" repro")]:
        return f" has no {', '.join(unknown)}"
    choices = next(
        (action.choices for action in command._actions if not action.option_strings and action.choices), None
    )
    if choices and words and not words[0].startswith("-") and words[0] not in choices:
        return f" has no {words[0]}"
    return None
