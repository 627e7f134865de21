"""One request harms no other: a real tritonserver refuses what exceeds a limit, a flood, and requests that are late."""

import contextlib
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from stand_in import ANSWER, HOSTILE, IMAGE, ask, client_of, endless, make_repository, metrics, pending

from vismem.errors import UserError
from vismem.serving import repository
from vismem.serving.client import main_infer
from vismem.serving.exchange import BusyError, Token
from vismem.serving.server import TritonServer, triton_server

WORKERS, IN_EXECUTE, QUEUE = 2, 1, 32


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_request_is_refused_and_the_answer_of_another_client_continues(
    kind: str, server: TritonServer
) -> None:
    options, reason = HOSTILE[kind]
    undisturbed = ask(server, "endless", max_new_tokens=12)
    other = client_of(server).stream([IMAGE], "endless", max_new_tokens=12)
    first = next(other)
    for stream in (True, False):
        with pytest.raises(UserError, match=reason):
            ask(server, **options, stream=stream)
    assert (first, *other) == undisturbed


def test_infer_refuses_with_the_same_words_before_it_sends_anything(tmp_path: Path) -> None:
    for options, reason in HOSTILE.values():
        values: dict[str, Any] = {"images": [IMAGE], "prompt": "hi"} | options
        files = []
        for number, image in enumerate(values.pop("images")):
            files.append(tmp_path / f"{number}.png")
            files[-1].write_bytes(image)
        named = re.sub(r"image (\d) of \d", lambda found: rf"{tmp_path}/{int(found[1]) - 1}\.png", reason)
        with pytest.raises(UserError, match=named):
            main_infer(list(map(str, files)), values.pop("prompt"), url="127.0.0.1:9", **values)


def test_a_flood_is_refused_at_once_beyond_the_queue_and_the_rest_is_answered(server: TritonServer) -> None:
    surplus = 7
    with ThreadPoolExecutor(IN_EXECUTE + QUEUE + surplus) as clients:
        with contextlib.closing(endless(server)) as first, contextlib.closing(endless(server)) as second:  # type: ignore[type-var]
            assert [next(first), next(second)] == [ANSWER[0]] * WORKERS
            asked = [clients.submit(ask, server) for _ in range(IN_EXECUTE + QUEUE + surplus)]
            while len(refused := [future for future in asked if future.done()]) < surplus:
                time.sleep(0.01)
            assert pending(server) == QUEUE
            assert next(first) == ANSWER[1]  # the workers are still busy with the first two
        for future in refused:
            with pytest.raises(BusyError, match="it is busy, its queue is full: try again later"):
                future.result()
        assert [future.result() for future in asked if future not in refused] == [ANSWER] * (IN_EXECUTE + QUEUE)
    assert ask(server) == ANSWER


def test_who_waits_longer_than_the_deadline_is_refused_and_the_server_answers_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "CONFIG", repository.CONFIG.replace(": 30000000", ": 2000000"))
    monkeypatch.setenv("VISMEM_WORKERS", str(WORKERS))
    with triton_server(make_repository(tmp_path), log=tmp_path / "log") as server, ThreadPoolExecutor(4) as clients:
        with contextlib.closing(endless(server)) as first, contextlib.closing(endless(server)) as second:  # type: ignore[type-var]
            assert [next(first), next(second)] == [ANSWER[0]] * WORKERS
            late: list[Future[tuple[Token, ...]]] = [clients.submit(ask, server) for _ in range(4)]
            for future in late:
                with pytest.raises(UserError, match="it is busy, the request waited too long: try again later"):
                    future.result()
            # those behind the one that execute() holds are refused in the queue: they do not wait for it one by one
            rejected = re.search(
                r'^nv_inference_request_failure\{model="vismem".*reason="REJECTED".*\} (\d+)',
                metrics(server),
                re.MULTILINE,
            )
            assert rejected is not None
            assert int(rejected[1]) > 0
            assert next(first) == ANSWER[1]
        assert ask(server) == ANSWER
