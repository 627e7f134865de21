"""Writes the example questions: `python -m examples.make` draws the first 20 of a seed that no split uses.

They come in the generator's order, with the test split's difficulty: none was picked.
"""

import json
from pathlib import Path

from vismem.config import ScenesSource
from vismem.data.scenes import generate

SEED, COUNT = 100, 20
FOLDER = Path(__file__).parent


def main(folder: Path = FOLDER) -> None:
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


if __name__ == "__main__":
    main()
