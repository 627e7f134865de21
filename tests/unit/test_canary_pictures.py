"""What a canary's answers to your own questions prove: questions about one picture are one observation."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vismem import canary
from vismem.config import Config
from vismem.errors import UserError
from vismem.serving.exchange import RefusedError

PER_PICTURE = 10


def asked(folder: Path, pictures: int) -> Path:
    """Questions about so many pictures, PER_PICTURE each; "yes" is right."""
    lines = []
    for picture in range(pictures):
        Image.new("RGB", (32, 32), (20 * picture, 0, 0)).save(folder / f"{picture}.png")
        row = {"image": f"{picture}.png", "answer": "yes", "choices": ["yes", "no"]}
        lines += [{"id": f"{picture}-{n}", "prompt": f"is it {n}?", **row} for n in range(PER_PICTURE)]
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "own.jsonl"


def told(folder: Path, monkeypatch: pytest.MonkeyPatch, pictures: int, wrong: str | dict[str, Any]) -> str:
    """What is said of a version where `wrong` ("canary" or "servers") is wrong about every second picture.

    Or it holds what answers in place of both.
    """

    class Answering:
        def __init__(self, address: str, model: str) -> None:
            self.wrong = address == wrong

        def ask(self, images: Any, question: str, **_: Any) -> str:
            shade = Image.open(io.BytesIO(images[0])).getpixel((0, 0))[0]  # type: ignore[index]
            return "no" if self.wrong and shade // 20 % 2 else "yes"

    (folder / canary.FOLDER / canary.FILE).parent.mkdir(exist_ok=True, parents=True)
    (folder / canary.FOLDER / canary.FILE).write_text("[]")
    given: Any = Answering if isinstance(wrong, str) else lambda address, _: SimpleNamespace(ask=wrong[address])
    monkeypatch.setattr(canary, "own_client", given)
    monkeypatch.setattr(canary, "_check_version", lambda *_: None)
    release: Any = SimpleNamespace(version="2", bundle=folder)
    return canary.question_canary(Config(), release, asked(folder, pictures), "canary", "servers")


def test_many_questions_about_few_pictures_do_not_prove_a_version_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "10 of 20 of own.jsonl right, 20 by the version before" in told(tmp_path, monkeypatch, 2, "canary")
    with pytest.raises(canary.WrongAnswerError, match=r"60 of 120 of own.jsonl right, 120 by the version before"):
        told(tmp_path, monkeypatch, 12, "canary")


def test_a_version_that_is_proven_better_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "120 of 120 of own.jsonl right, 60 by the version before" in told(tmp_path, monkeypatch, 12, "servers")


def test_a_question_that_no_version_may_answer_is_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> str:
        raise RefusedError("image 1 holds 90,000,000 bytes")

    fault = r"own.jsonl: 'is it 0.' is refused: image 1 holds .* mend the file"
    with pytest.raises(UserError, match=fault) as raised:
        told(tmp_path, monkeypatch, 1, {"canary": refused, "servers": refused})
    assert not isinstance(raised.value, canary.WrongAnswerError)
    with pytest.raises(canary.WrongAnswerError, match=r"it fails at 'is it 0.': image 1 holds"):
        told(tmp_path, monkeypatch, 1, {"canary": refused, "servers": lambda *_, **__: "yes"})
