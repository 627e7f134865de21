"""What a judge's reply says, one number from 0 to 1 or nothing, and what becomes of replies that mean harm."""

import json
import time
from pathlib import Path

import pytest

from vismem.errors import UserError
from vismem.evaluation.judge import Judge, _score_in


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        *((reply, 0.5) for reply in ("0.5", " 0.5\n", "0.5.", "**0.5**", "Score: 0.5", "score=0.5", r"\boxed{0.5}")),
        *((reply, 1.0) for reply in ("1", "1.0", "1 (1.0)", "<think>0.2 or 0.3?</think>1.0")),
        *((reply, 0.0) for reply in ("0", "0.0", "The score is 0.")),
        *((reply, None) for reply in ("1/10", "1/2", "1 of 10", "1 out of 5", "-1", "\u22121", "1%", "100%", "1e-3")),
        *((reply, None) for reply in ("0,5", "0.5 or 1.0", "7", "1.5", "A1 is wrong", "1st", "2: no, 1", "", "None")),
        *((reply, None) for reply in ("<think>1.0", "0.5-0.6", "10", "0.5/1.0")),
    ],
)
def test_a_verdict_is_one_number_from_0_to_1(reply: str, score: float | None) -> None:
    assert _score_in(reply) == score


def test_a_reply_without_end_is_read_in_the_end() -> None:
    """With the square of its length this would take hours."""
    for word in ("no", "1", "<think>", "0.5 ", "-"):
        assert _score_in(word * 200_000) == (0.5 if word == "0.5 " else None)


class Reply:
    """What an endpoint answers."""

    def __init__(self, body: str) -> None:
        self.body = body

    def raise_for_status(self) -> "Reply":
        return self

    def json(self) -> object:
        return json.loads(self.body)


def judged(
    body: str, folder: Path, patch: pytest.MonkeyPatch, asked: list[tuple[str, str, str]]
) -> tuple[list[float | None], int]:
    """The scores, and how many requests were made."""
    requests = list[object]()

    def post(*_: object, json: object, **__: object) -> Reply:
        requests.append(json)
        time.sleep(0.02)  # others ask meanwhile
        return Reply(body)

    patch.setattr("vismem.evaluation.judge.httpx2.post", post)
    return Judge("http://judge/v1", "m", folder).scores("Be fair.", asked), len(requests)


def test_answers_that_are_alike_are_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once would also replace one file."""
    body = json.dumps({"choices": [{"message": {"content": "1.0"}}]})
    asked = [("Why?", "joke", "a joke")] * 40 + [("Why?", "joke", "?")]
    assert judged(body, tmp_path, monkeypatch, asked) == ([1.0] * 41, 2)
    assert judged("", tmp_path, monkeypatch, asked) == ([1.0] * 41, 0)


@pytest.mark.parametrize(
    ("content", "score"),
    [('"1.0 \\ud83d"', 1.0), ("null", None), ("1", 1.0), ('[{"type": "text", "text": "0.5"}]', 0.5)],
)
def test_whatever_a_judge_says_is_kept_and_read(
    content: str, score: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f'{{"choices": [{{"message": {{"content": {content}}}}}]}}'
    for requests in (1, 0):
        assert judged(body, tmp_path, monkeypatch, [("?", "a", "b")]) == ([score], requests)


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"choices": []}', '{"choices": [{"message": {}}]}', "[" * 10**5])
def test_a_reply_of_another_form_is_an_error_in_one_line(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"the judge at http://judge/v1/chat/completions does not score \(.*\): see"):
        judged(body, tmp_path, monkeypatch, [("?", "a", "b")])
