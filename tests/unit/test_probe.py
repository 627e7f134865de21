"""What counts as a model that does not answer, and how long a server that ends waits for answers."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vismem.errors import UserError
from vismem.serving import probe, server
from vismem.serving.probe import check_model

NOWHERE = "http://127.0.0.1:9/metrics"


def silent() -> None:
    raise UserError("it sent nothing")


def test_a_model_that_answers_is_well_where_metrics_cannot_be_read() -> None:
    assert check_model(lambda: None, NOWHERE, "vismem", 0.0) == "vismem answers"
    with pytest.raises(UserError, match="it sent nothing"):
        check_model(silent, NOWHERE, "vismem", 0.0)


@pytest.mark.parametrize(("read", "others"), [((3, 3, 5), 2), ((None, 3, None, 4), 1), ((3, None, 9), 6)])
def test_tokens_for_others_are_counted_over_readings_that_fail(
    monkeypatch: pytest.MonkeyPatch, read: tuple[int | None, ...], others: int
) -> None:
    readings: Iterator[int | None] = iter(read)
    monkeypatch.setattr(probe, "_decoded", lambda *_: next(readings))
    assert f"it decoded {others} tokens for others" in check_model(silent, NOWHERE, "vismem", 60.0)


def test_a_server_that_dies_while_it_is_asked_is_told_at_once() -> None:
    def ended() -> None:
        raise UserError("tritonserver was killed by signal 9")

    with pytest.raises(UserError, match="killed by signal 9"):
        check_model(silent, NOWHERE, "vismem", 1e9, ended)


def test_a_server_that_has_ended_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vismem").mkdir()
    (tmp_path / "vismem" / "config.pbtxt").touch()
    monkeypatch.setattr(server, "DRAIN_SECONDS", 1e9)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    service: Any = SimpleNamespace(process=process)
    server._drain(tmp_path, tmp_path, service)
    assert (tmp_path / "drain").exists()
