"""What a judge's reply says, one number from 0 to 1 or nothing, and what becomes of replies that mean harm."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from vismem.errors import UserError
from vismem.evaluation import judge as module
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


Reply = tuple[int, dict[str, str], str]  # status, headers, body
ASKED = [("?", "a", "b")]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY", module.RETRY.new(backoff_factor=0, backoff_jitter=0))


def said(content: str) -> Reply:
    """A reply whose content is this JSON."""
    return 200, {}, f'{{"choices": [{{"message": {{"content": {content}}}}}]}}'


@contextmanager
def judge(folder: Path, *replies: Reply) -> Iterator[tuple[Judge, list[str]]]:
    """One whose endpoint replies so, in the end always with the last, and the requests that it got."""
    requests: list[str] = []

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(self.path)
            status, headers, body = replies[min(len(requests), len(replies)) - 1]
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(0.02)  # others ask meanwhile
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield Judge(f"http://127.0.0.1:{server.server_port}/v1", "m", folder), requests
        finally:
            server.shutdown()


def test_answers_that_are_alike_are_judged_once(tmp_path: Path) -> None:
    """Two at once would also replace one file."""
    asked = [("Why?", "joke", "a joke")] * 40 + [("Why?", "joke", "?")]
    with judge(tmp_path, said('"1.0"')) as (found, requests):
        for _ in range(2):
            assert found.scores("Be fair.", asked) == [1.0] * 41
        assert len(requests) == 2


@pytest.mark.parametrize(
    ("content", "score"),
    [('"1.0 \\ud83d"', 1.0), ("null", None), ("1", 1.0), ('[{"type": "text", "text": "0.5"}]', 0.5)],
)
def test_whatever_a_judge_says_is_kept_and_read(content: str, score: float | None, tmp_path: Path) -> None:
    with judge(tmp_path, said(content)) as (found, requests):
        for _ in range(2):
            assert found.scores("Be fair.", ASKED) == [score]
        assert len(requests) == 1


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"choices": []}', '{"choices": [{"message": {}}]}', "[" * 10**5])
def test_a_reply_of_another_form_is_an_error_in_one_line(body: str, tmp_path: Path) -> None:
    with (
        judge(tmp_path, (200, {}, body)) as (found, _),
        pytest.raises(UserError, match=r"^the judge at http://.*/v1/chat/completions does not score \(.*\): see .*$"),
    ):
        found.scores("Be fair.", ASKED)


def test_a_busy_judge_is_asked_again(tmp_path: Path) -> None:
    with judge(tmp_path, (429, {}, ""), (503, {}, ""), said('"0.5"')) as (found, requests):
        assert found.scores("Be fair.", ASKED) == [0.5]
        assert len(requests) == 3


@pytest.mark.parametrize(
    ("status", "headers", "times"),
    [(429, {}, 7), (401, {}, 1), (400, {}, 1), (429, {"Retry-After": "soon"}, 1)],
)
def test_a_judge_that_goes_on_refusing_is_an_error(
    status: int, headers: dict[str, str], times: int, tmp_path: Path
) -> None:
    with judge(tmp_path, (status, headers, "")) as (found, requests):
        with pytest.raises(UserError, match=r"does not score \(.*(4\d\d|soon).*\): see its address"):
            found.scores("Be fair.", ASKED)
        assert len(requests) == times
