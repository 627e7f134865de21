"""The cards of the tiny VLM and of its memory: what they are, how they were made, and how good they are."""

import shutil
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from vismem.files import read_json, write_json, write_text
from vismem.provenance import file_hashes, versions, write_manifest

FACTS = "training.json"
CARD = "README.md"
STARTED = "started.json"  # what an unfinished run is making, and by which command and commit


def begin(work: Path, wanted: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """The facts of the run in `work`: those of the run to resume, if it was making `wanted`; else a new run's."""
    started = read_json(work / STARTED) if (work / STARTED).is_file() else {}
    if started | wanted != started:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        started = {**wanted, **origin}
        write_json(work / STARTED, started)
    return started


def write_card(folder: Path, template: str, facts: dict[str, Any]) -> None:
    """Write the facts, with the versions that they lack, the card that states them, and the manifest of all files."""
    facts = {"template": template, **facts}
    facts.setdefault("versions", versions())
    write_json(folder / FACTS, facts)
    (folder / CARD).unlink(missing_ok=True)
    write_text(folder / CARD, render(facts, file_hashes(folder)))
    write_manifest(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone


def render(facts: dict[str, Any], files: dict[str, str]) -> str:
    """The card's text; `files` are the sha256 of the others by name."""
    template = Path(__file__).with_name(facts["template"]).read_text()
    card: str = Template(template, undefined=StrictUndefined, keep_trailing_newline=True).render(facts, files=files)
    return card
