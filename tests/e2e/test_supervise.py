"""`vismem serve` on a real tritonserver: it restarts what fails, loads new releases under load, and ends cleanly."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from stand_in import IMAGE, make_repository

from vismem.errors import UserError
from vismem.serving.client import Client
from vismem.serving.exchange import BusyError, Token
from vismem.steps import replace_folder

CODE = """
import sys, time
from pathlib import Path
from vismem.config import parse_config
from vismem.errors import UserError
from vismem.serving import supervise
supervise.CHECK_SECONDS, supervise.PATIENCE = 0.5, 2.0
repository, slow, fetching = Path("deploy/model_repository"), Path("slow"), Path("fetching")
def champion():
    if slow.exists():
        slow.rename(fetching)
    while fetching.exists():
        time.sleep(0.05)
    return repository
try:
    supervise.serve(parse_config({}), repository, champion=champion, log=Path("log"), grpc_port=int(sys.argv[1]),
                    http_port=0, metrics_port=0, write=lambda line: print(line, flush=True))
except UserError as error:
    sys.exit(str(error))
"""


class Serving:
    """A running `vismem serve`."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder, self.lines = folder, list[str]()
        command = [sys.executable, "-c", CODE, str(port)]
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def said(self, text: str, after: int = 0) -> str:
        """The first line that holds `text`, waited for; where none comes, the error has Triton's log."""
        try:
            return str(until(lambda: next((line for line in self.lines[after:] if text in line), "")))
        except AssertionError as error:
            error.add_note(f"said: {self.lines}\n{(self.folder / 'log').read_text()[-9000:]}")
            raise

    @property
    def url(self) -> str:
        return self.said("serving ").split(" on gRPC ")[1].split()[0]

    def ask(self, prompt: str = "hi", timeout: float = 20, **options: Any) -> str:
        options = {"max_new_tokens": 3} | options
        return str(self.client.ask(IMAGE, prompt, timeout=timeout, **options))

    @property
    def client(self) -> Client:
        return Client(f"grpc://{self.url}", model="vismem")

    def endless(self) -> Iterator[Token]:
        return self.client.stream(IMAGE, "endless", max_new_tokens=2000, timeout=60)

    def answers(self) -> bool:
        try:
            return bool(self.ask(timeout=1))
        except UserError:
            return False

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def commands(self) -> Iterator[str]:
        """The command lines of its children."""
        for child in self.children():
            with suppress(psutil.NoSuchProcess):  # one that has just ended
                yield " ".join(child.cmdline())

    def process_of(self, model: str) -> psutil.Process:
        stubs = [child for child in self.children() if "stub" in child.name()]
        return next(stub for stub in stubs if any(f"/{model}/" in word for word in stub.cmdline()))


def until(found: Callable[[], Any], seconds: float = 180) -> Any:
    """What `found` returns, waited for until it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def runs(process: psutil.Process) -> bool:
    """Whether it does; what nobody has reaped yet has ended, too."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("vismem_*")}


@pytest.fixture
def serving(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    make_repository(tmp_path / "deploy", name=getattr(request, "param", "vismem"))
    running = Serving(tmp_path)
    try:
        until(lambda: running.lines or running.process.poll() is not None)
        yield running
    finally:
        running.process.terminate()
        running.process.wait(60)
        running.reader.join()


def test_a_dead_model_process_is_found_and_replaced(serving: Serving) -> None:
    before = serving.children()
    with pytest.raises(UserError):
        serving.ask("die", timeout=30)
    serving.said("the server is restarted")
    until(serving.answers)
    assert not [process for process in before if runs(process)]


def test_a_hung_model_process_is_found_under_requests_and_its_streams_end_with_an_error(serving: Serving) -> None:
    stream = serving.endless()
    next(stream)
    before = serving.children()
    serving.process_of("vismem").send_signal(signal.SIGSTOP)
    for _ in range(5):
        threading.Thread(target=serving.answers).start()
    with pytest.raises(UserError):
        list(stream)
    serving.said("the server is restarted")
    until(serving.answers)
    assert not [process for process in before if runs(process)]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_failed_process_of_the_unary_model_is_found_too(serving: Serving, fault: signal.Signals) -> None:
    before = serving.process_of("vismem_unary")
    before.send_signal(fault)
    serving.said("the server is restarted")
    until(serving.answers)
    assert not runs(before)


def test_a_failed_process_is_found_while_a_champion_is_fetched_and_the_fetch_ends_with_the_server(
    serving: Serving,
) -> None:
    (serving.folder / "slow").touch()
    until((serving.folder / "fetching").exists)
    serving.process_of("vismem").send_signal(signal.SIGKILL)
    serving.said("the server is restarted")
    until(serving.answers)
    serving.process.terminate()
    assert serving.process.wait(60) == 0


def test_sigterm_ends_running_streams_with_an_error_and_leaves_nothing(serving: Serving) -> None:
    streams = [serving.endless() for _ in range(3)]
    for stream in streams:
        next(stream)
    before = serving.children()
    mine = {name for name in shared_memory() if name.startswith(f"vismem_{serving.process.pid}_")}
    assert mine
    serving.process.terminate()
    for stream in streams:
        with pytest.raises(BusyError, match="the server stops: ask again later"):
            list(stream)
    assert serving.process.wait(60) == 0
    serving.reader.join()
    assert serving.lines[-1] == "stopped"
    log = (serving.folder / "log").read_text()
    assert "Signal (6)" not in log
    assert "Exit timeout expired" not in log
    assert not mine & shared_memory()
    assert not [process for process in before if runs(process)]
    assert sorted(path.name for path in serving.folder.iterdir()) == ["deploy", "log"]


def test_a_second_server_on_the_port_says_so_and_fails(serving: Serving) -> None:
    second = Serving(serving.folder, port=int(serving.url.rpartition(":")[2]))
    _, error = second.process.communicate(timeout=60)
    second.reader.join()
    assert second.process.returncode == 1
    assert "cannot be used (Address already in use): choose another with --grpc-port" in error
    assert serving.answers()


def deploy(serving: Serving, **options: Any) -> None:
    """As `vismem deploy` does: a new folder in the place of the old."""
    make_repository(serving.folder / "partial", **options)
    replace_folder(serving.folder / "partial", serving.folder / "deploy")


def test_new_releases_and_rollbacks_are_loaded_without_a_failed_request_and_bad_ones_refused(serving: Serving) -> None:
    stop, faults, words = threading.Event(), list[str](), list[str]()

    def client() -> None:
        while not stop.is_set():
            try:
                words.append(serving.ask())
            except UserError as error:
                faults.append(str(error))

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    try:
        question = {"images": ["image"], "question": "hi", "tokens": list(range(24))}
        deploy(serving, version=8, word="good", golden=[question])
        serving.said("vismem: the new release answers now")
        assert serving.ask() == "good0 good1 good2"
        place = len(serving.lines)
        deploy(serving, version=9, word="bad", golden=[question | {"tokens": [7]}])
        assert "answered by the tokens [0, 1, 2" in serving.said("refused, the one before it serves on", place)
        assert serving.ask() == "good0 good1 good2"
        (link,) = serving.folder.glob("serving-*/repository/vismem")
        assert (link / "8").is_dir()  # what a restart would load
        assert not list(serving.folder.glob("serving-*/copies/*/9"))
        place = len(serving.lines)
        deploy(serving)  # what was served first: a rollback
        serving.said("vismem: the new release answers now", place)
        assert serving.ask() == "é0 é1 é2"
        place = len(serving.lines)
        deploy(serving, word="again")
        serving.said("vismem: the new release answers now", place)
        until(lambda: words[-1] == "again0 again1 again2")  # a client may have been answered by the one before
        assert len(list(serving.folder.glob("serving-*/copies/*"))) == 3  # this one, the one before, their unary model
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert faults == []
    assert set(words) == {f"{w}0 {w}1 {w}2" for w in ("é", "good", "again")}
    assert len(serving.lines) == 6, serving.lines


def test_two_servers_of_one_folder_both_load_a_release(serving: Serving) -> None:
    until(serving.answers)
    other = Serving(serving.folder)
    try:
        until(other.answers)
        deploy(serving, word="good")
        for server in (serving, other):
            server.said("vismem: the new release answers now")
            assert server.ask() == "good0 good1 good2"
    finally:
        other.process.terminate()
        other.process.communicate(timeout=60)
        other.reader.join()
    assert "log: log-2; stop with Ctrl-C" in other.lines, other.lines


@pytest.mark.parametrize("serving", ["vismem_challenger"], indirect=True)
def test_a_challenger_is_unloaded_once_a_release_answers_and_not_for_one_that_is_refused(serving: Serving) -> None:
    def models() -> set[str]:
        return {path.name for path in next(serving.folder.glob("serving-*/repository")).iterdir()}

    challenger = Client(f"grpc://{serving.url}", model="vismem_challenger")
    question = {"images": ["image"], "question": "hi", "tokens": [7]}
    deploy(serving, golden=[question])
    serving.said("vismem: the new release is refused")
    assert models() == {"vismem_challenger", "vismem_challenger_unary"}
    assert challenger.ask(IMAGE, "hi", max_new_tokens=3) == "é0 é1 é2"
    deploy(serving, word="good")
    serving.said("vismem: the new release answers now")
    until(lambda: models() == {"vismem", "vismem_unary"})
    until(lambda: not any("/vismem_challenger" in command for command in serving.commands()))
    assert serving.ask() == "good0 good1 good2"
    assert serving.answers()
