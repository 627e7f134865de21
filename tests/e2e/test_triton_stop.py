"""A server that is told to stop, with time for the answers that run."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from stand_in import IMAGE, ask, client_of, make_repository

from vismem.serving import server as module
from vismem.serving.exchange import BusyError
from vismem.serving.server import triton_server


def test_running_answers_end_and_new_questions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAIN_SECONDS", 30.0)
    with ThreadPoolExecutor(2) as pool:
        with triton_server(make_repository(tmp_path), log=tmp_path / "log") as server:
            running = client_of(server).stream([IMAGE], "endless", max_new_tokens=250)  # five seconds
            next(running)
            rest = pool.submit(list, running)
            late = pool.submit(refused_at_last, server)
        assert len(rest.result()) == 251
        assert late.result().endswith("the server stops: ask again later")
    assert "Exit timeout expired" not in (tmp_path / "log").read_text()


def refused_at_last(server: module.TritonServer) -> str:
    """Ask until a question is refused; why it is."""
    for _ in range(250):
        try:
            ask(server)
        except BusyError as error:
            return str(error)
    return "never"
