"""`vismem api`: what its options do to the server that it starts."""

import json
import math
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from certificates import write_pair
from http_calls import messages, post
from stand_in import png

from vismem import cli
from vismem.api import _Server, serve_api
from vismem.ask import DEFAULT_MODEL
from vismem.errors import UserError
from vismem.generation.torch_executor import TorchExecutor
from vismem.runtime.access import TOKEN_VARIABLE
from vismem.services import DRAIN_VARIABLE

PICTURE = png(84, 84)  # 36 patches
SAID = list[str]()  # the line that each server prints


@contextmanager
def api(*options: str) -> Iterator[str]:
    """The address of the model that ships, served with these options."""
    command = [sys.executable, "-m", "vismem.cli", "api", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        SAID.append(line := process.stdout.readline())
        try:
            yield line.split()[4].rstrip(",").removesuffix("/v1")
        finally:
            process.terminate()


def test_with_a_certificate_nothing_is_said_in_clear(tmp_path: Path) -> None:
    certificate, key = write_pair(tmp_path)
    trusted = ssl.create_default_context(cafile=str(certificate))
    with api(f"--tls-certificate={certificate}", f"--tls-key={key}") as address:
        assert address.startswith("https://127.0.0.1:")
        with urllib.request.urlopen(f"{address}/health", context=trusted, timeout=30) as reply:
            assert json.loads(reply.read()) == {"status": "ok"}
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(address.replace("https", "http") + "/health", timeout=30)


@pytest.mark.parametrize("option", ["--tls-certificate", "--tls-key"])
def test_half_a_certificate_starts_no_server(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["api", "--port", "0", option, __file__]) == 1
    assert "TLS needs both --tls-certificate and --tls-key" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["api", "serve"])
def test_a_key_of_another_certificate_starts_no_server(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = write_pair(tmp_path)[0], write_pair(tmp_path, "other-")[1]
    options = [f"--tls-certificate={certificate}", f"--tls-key={key}"]
    assert cli.main([command, "--port", "0", *options, *(["--repository", f"{tmp_path}"] * (command == "serve"))]) == 1
    assert "are no PEM certificate with its key: [X509: KEY_VALUES_MISMATCH]" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["api", "serve"])
@pytest.mark.parametrize("token", ["sécret", "two\nlines"])
def test_a_token_that_no_client_can_send_starts_no_server(
    command: str, token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    assert cli.main([command, "--port", "0", *(["--repository", f"{tmp_path}"] * (command == "serve"))]) == 1
    assert "VISMEM_API_TOKEN must be one line of ASCII" in capsys.readouterr().err


def test_more_patches_than_the_server_allows_are_refused() -> None:
    asked = {"model": "vismem", "messages": messages([PICTURE], "what?"), "max_tokens": 1}
    with api("--max-patches", "36") as address:
        assert post(address, asked)[0] == 200
        asked["messages"] = messages([PICTURE, PICTURE], "what?")
        status, reply = post(address, asked)
        assert (status, reply["error"]["message"]) == (
            400,
            "the images make 72 patches: the limit is 36; send fewer or smaller",
        )


def test_a_name_that_a_page_of_another_site_made_its_own_is_refused_unless_a_token_guards() -> None:
    def status(address: str, host: str, **more: str) -> int:
        request = urllib.request.Request(f"{address}/v1/models", headers={"Host": host, **more})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)

    with api() as address:
        port = address.rpartition(":")[2]
        assert [status(address, f"{host}:{port}") for host in ("127.0.0.1", "localhost", "[::1]")] == [200] * 3
        with pytest.raises(urllib.error.HTTPError, match="400"):
            status(address, f"evil.example:{port}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, "s3cret")
        with api() as address:
            assert status(address, "models.example", Authorization="Bearer s3cret") == 200


def test_connections_that_say_nothing_shut_nobody_out() -> None:
    with api() as address, ExitStack() as idle:
        host, port = address.removeprefix("http://").split(":")
        for _ in range(330):
            idle.enter_context(socket.create_connection((host, int(port)), timeout=30))
        with urllib.request.urlopen(f"{address}/health", timeout=30) as reply:
            assert json.loads(reply.read()) == {"status": "ok"}


@pytest.mark.parametrize(("token", "warned"), [("", True), ("s3cret", False)])
def test_a_server_that_others_reach_without_a_token_says_so(
    token: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with api("--host", "0.0.0.0") as address:
        assert address.startswith("http://0.0.0.0:")
        assert ("without a token, to all who reach this machine" in SAID[-1]) == warned


def test_a_server_whose_thread_that_decodes_has_ended_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked by a client as soon as it says that it serves; what was in the making is answered before it ends."""

    def die(*_: object) -> None:
        tf32.append(torch.backends.cuda.matmul.allow_tf32)
        raise SystemExit

    def ask(line: str) -> None:
        address = line.split()[4].rstrip(",").removesuffix("/v1")
        asked = {"model": "vismem", "messages": messages([PICTURE], "what?"), "max_tokens": 1}
        client.append(threading.Thread(target=lambda: statuses.append(post(address, asked)[0])))
        client[0].start()

    client: list[threading.Thread] = []
    statuses: list[int] = []
    tf32: list[bool] = []
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(TorchExecutor, "choose", die)
    with pytest.raises(UserError, match=r"^the thread that decodes has ended, and the server with it: start it again$"):
        serve_api(DEFAULT_MODEL, dtype="bfloat16", port=0, max_patches=64, cache_mb=1, write=ask)
    client[0].join(30)
    assert statuses == [429]
    assert (tf32, torch.backends.cuda.matmul.allow_tf32) == ([True], False), "beside bfloat16, while it serves"


@pytest.mark.parametrize(("given", "drain"), [(None, 5.0), ("30.5", 30.5)])
def test_running_answers_get_the_seconds_that_the_environment_says(
    given: str | None, drain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = list[_Server]()
    monkeypatch.setattr(_Server, "run", lambda server: servers.append(server))
    if given:
        monkeypatch.setenv(DRAIN_VARIABLE, given)
    with pytest.raises(UserError):
        serve_api(DEFAULT_MODEL, port=0, max_patches=64, cache_mb=1)
    assert servers[0].drain == drain
    assert servers[0].config.timeout_graceful_shutdown == math.ceil(drain) + 5
