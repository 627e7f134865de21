"""Servers as child processes: each is started, waited for, watched, and stopped with its parent."""

import os
import pwd
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vismem.errors import UserError

HOST = "127.0.0.1"
DRAIN_VARIABLE = "VISMEM_DRAIN_SECONDS"  # that running answers get to end in when their server stops
TERMINATED = 128 + signal.SIGTERM  # the exit status of a process that SIGTERM ended
READY_SECONDS = 300.0  # a busy machine needs minutes to import MLflow
POLL = 0.2  # seconds
MARK = "VISMEM_SERVICE_OF"  # a variable in a service's environment: the folder that it works in


class NotYetError(Exception):
    """A service does not answer yet."""


def check_certificate(certificate: Path | None, key: Path | None) -> None:
    """UserError where only one of a server's certificate and its key is given, or they do not fit."""
    if (certificate is None) != (key is None):
        raise UserError("TLS needs both --tls-certificate and --tls-key")
    if certificate and key:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")  # asks nobody
        except OSError as error:  # ssl.SSLError is one
            raise UserError(f"{certificate} and {key} are no PEM certificate with its key: {error}") from None


def check_http(url: str) -> None:
    """Ask a server for a page. NotYetError where it does not answer, or answers with an HTTP error."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError as error:
        raise NotYetError(str(error)) from None


def last_error(lines: Sequence[str]) -> str:
    """The log's last line about an error, else its last line."""
    errors = [line for line in lines if re.search(r"error|exception|fatal|panic", line, re.IGNORECASE)]
    return (errors or list(lines))[-1]


@dataclass(frozen=True)
class Service:
    """A running server with its children; leaving its `with` block stops it."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    stop_signal: signal.Signals
    stop_seconds: float
    find_error: Callable[[Sequence[str]], str]

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self) -> None:
        """UserError with the telling line of its log where it has exited."""
        if (status := self.process.poll()) is not None:
            raise self.failure(f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}")

    def wait_until(self, probe: Callable[[], None], seconds: float = READY_SECONDS) -> None:
        """Wait until the probe no longer raises NotYetError. UserError as from `check`, and after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            self.check()
            try:
                return probe()
            except NotYetError as error:
                if time.monotonic() > deadline:
                    raise self.failure(f"was not ready after {seconds:g} s ({error})") from None
            time.sleep(POLL)

    def failure(self, what: str) -> UserError:
        """The error to raise: what happened, the telling line of the log, and where the log is."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = self.find_error(lines) if lines else "it wrote nothing"
        return UserError(f"{self.name} {what}: {said}; its log is {self.log}")

    def stop(self) -> None:
        """Stop it gracefully, then kill what is left of its process group. Does nothing the second time."""
        self.process.send_signal(self.stop_signal)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self.stop_seconds)
        self.kill()

    def kill(self) -> None:
        """End it and its process group at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start_service(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    stop_signal: signal.Signals = signal.SIGTERM,
    stop_seconds: float = 20.0,
    never_root: bool = False,
    find_error: Callable[[Sequence[str]], str] = last_error,
) -> Service:
    """Start a server that writes to `log`, in a process group of its own: Ctrl-C does not reach it.

    `find_error` picks the line of the log that explains a failure. For the rest see `with_parent`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            with_parent(command, stop_signal, never_root=never_root),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Service(name, process, log, stop_signal, stop_seconds, find_error)


def with_parent(command: Sequence[str], stop_signal: signal.Signals, *, never_root: bool = False) -> list[str]:
    """The command under util-linux's `setpriv`, so that it gets `stop_signal` when this process dies, even by SIGKILL.

    `never_root` is for a program that refuses to run as root: then it runs as `nobody`, with the right to reach
    folders of root. UserError where that cannot be done.
    """
    user = unprivileged_user() if never_root else None
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        if user is not None:
            raise UserError(f"{Path(command[0]).name} does not run as root: be another user, or install util-linux")
        return list(command)
    options = ["--pdeathsig", stop_signal.name.removeprefix("SIG")]
    if user is not None:
        options += [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        options += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return [setpriv, *options, *command]


def unprivileged_user() -> pwd.struct_passwd | None:
    """`nobody` where this process is root's, else None."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def watch(services: Sequence[Service]) -> NoReturn:
    """Wait until one of the services exits, and raise its UserError."""
    while True:
        for service in services:
            service.check()
        time.sleep(POLL)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables within the block, for what reads them then and for processes that start there."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """A block that SIGTERM ends in order, with TERMINATED, so that its children are stopped; main thread only."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set a signal's handler
        yield
        return

    def end(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, lambda *_: None)  # a second one would cut off what the first one set in order
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def until_stopped(write: Callable[[str], None]) -> Iterator[None]:
    """A block that serves until Ctrl-C or SIGTERM; then it ends without an error and writes "stopped"."""
    try:
        with exit_on_sigterm():
            yield
    except (KeyboardInterrupt, SystemExit) as end:
        if getattr(end, "code", TERMINATED) != TERMINATED:
            raise  # nobody stopped it
        write("stopped")


def end_leftovers(folder: Path) -> None:
    """Stop services whose MARK is `folder` and which outlived a killed parent, and wait until they have exited."""
    import psutil

    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder):
                process.send_signal(signal.SIGINT)
                left.append(process)
    for process in psutil.wait_procs(left, timeout=20)[1]:
        with suppress(psutil.Error):
            process.kill()


def free_ports(wanted: Mapping[str, int], *, host: str = HOST, flag: str = "--{name}-port") -> dict[str, int]:
    """The ports by name, a free one for each 0. UserError where one asked for is in use.

    `flag` names the option that chooses another port; `{name}` in it is the port's name.
    """
    found: dict[str, int] = {}
    with ExitStack() as held:  # all at once, so that they differ
        for name, port in wanted.items():
            listener = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen()
            except (OSError, OverflowError) as error:  # OverflowError: there is no such port
                raise UserError(
                    f"port {port} on {host} cannot be used ({getattr(error, 'strerror', error)}): "
                    f"choose another with {flag.format(name=name)}, 0 for any free one"
                ) from None
            found[name] = listener.getsockname()[1]
    return found
