"""Writes the examples: `python -m examples.make` draws the first 20 questions of a seed that no split uses.

They come in the generator's order, with the test split's difficulty: none was picked. It also runs the notebook, whose
outputs are what the model says.
"""

import json
import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from vismem.config import ScenesSource
from vismem.data.scenes import generate

SEED, COUNT = 100, 20
FOLDER = Path(__file__).parent
NOTEBOOK = FOLDER / "quickstart.ipynb"
QUIET = {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def write_questions(folder: Path) -> None:
    """Write `questions.jsonl` and `images/` into the folder."""
    (folder / "images").mkdir(exist_ok=True)
    lines = []
    for number, sample in enumerate(generate(ScenesSource(), "test", SEED, COUNT), 1):
        letters = "ab" if len(sample.images) > 1 else ("",)
        names = [f"{number:02d}{letter}" for letter in letters]
        for name, image in zip(names, sample.images, strict=True):
            (folder / "images" / f"{name}.png").write_bytes(image)
        row = {
            "id": f"{number:02d}",
            "images": [f"images/{name}.png" for name in names],
            "prompt": sample.question,
            "answer": sample.answer,
            "choices": sample.choices,
            "task": sample.task,
            "capability": sample.capability,
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))


def run_notebook() -> Any:
    """The notebook with fresh outputs. CellExecutionError where a cell fails."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=120, record_timing=False, coalesce_streams=True)
    return client.execute(cwd=str(FOLDER), env={**os.environ, **QUIET, "PYTHONPATH": str(FOLDER.parent)})


if __name__ == "__main__":
    write_questions(FOLDER)
    nbformat.write(run_notebook(), NOTEBOOK)
