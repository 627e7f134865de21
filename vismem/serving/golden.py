"""Golden questions: what a bundle answered where it was exported. A server asks them before it serves the bundle.

`golden/golden.json` in the bundle: per question its images' files, the text, the answer's tokens with its invokes, and
the answer as a client shows it (`Answer.marked`), by which a canary is judged.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from vismem.models.tokens import marked_text
from vismem.runtime.limits import RequestError
from vismem.serving.answering import Runtime
from vismem.serving.pieces import Chunk

FOLDER, FILE = "golden", "golden.json"
QUESTIONS = 4  # at most
NEW_TOKENS = 24  # of an answer: enough for a memory and words behind it


def write_golden(runtime: Runtime, questions: Iterable[tuple[Iterable[bytes], str]], bundle: Path) -> int:
    """Store in `bundle` the first QUESTIONS (encoded images, text) that `runtime` takes, with their greedy answers.

    Returns how many there are.
    """
    (bundle / FOLDER).mkdir()
    stored: list[dict[str, Any]] = []
    for number, (images, question) in enumerate(questions, start=1):
        asked: dict[str, Any] = {"images": [], "question": question}
        for place, image in enumerate(images, start=1):
            asked["images"].append(f"{number}-{place}")
            (bundle / FOLDER / asked["images"][-1]).write_bytes(image)
        try:
            chunks = _chunks(runtime, bundle, asked)
        except RequestError:
            for name in asked["images"]:
                (bundle / FOLDER / name).unlink()
            continue
        shown = "".join(marked_text(chunk.text, chunk.event) for chunk in chunks).strip()
        stored.append(asked | {"tokens": _tokens(chunks), "answer": shown})
        if len(stored) == QUESTIONS:
            break
    (bundle / FOLDER / FILE).write_text(json.dumps(stored, ensure_ascii=False, indent=1) + "\n")
    return len(stored)


def check_golden(runtime: Runtime, bundle: Path) -> int:
    """Ask the golden questions of a verified bundle; return how many there are. This warms the graphs up, too.

    RuntimeError for a bundle without them, and for the first answer that differs from the stored one.
    """
    file = bundle / FOLDER / FILE
    if not file.is_file():
        raise RuntimeError(f"{bundle} holds no golden questions ({FOLDER}/{FILE}): export it again")
    questions: list[dict[str, Any]] = json.loads(file.read_text())
    for asked in questions:
        if (found := _tokens(_chunks(runtime, bundle, asked))) != asked["tokens"]:
            raise RuntimeError(
                f"the golden question '{asked['question']}' is answered by the tokens {found}, not {asked['tokens']} "
                "as where the bundle was exported: this machine computes otherwise, or the bundle is not what it was"
            )
    return len(questions)


def _chunks(runtime: Runtime, bundle: Path, asked: dict[str, Any]) -> list[Chunk]:
    """The greedy answer."""
    images = [Image.open(bundle / FOLDER / name) for name in asked["images"]]
    return list(runtime.generate(images, asked["question"], max_new_tokens=NEW_TOKENS))


def _tokens(chunks: list[Chunk]) -> list[int]:
    """The ids of the words and invoke tokens."""
    return [chunk.token for chunk in chunks if chunk.token is not None]
