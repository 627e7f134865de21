"""Servers as child processes: started on ports known to be free, watched, and gone when the one who started them is."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vismem.errors import UserError

HOST = "127.0.0.1"
READY_SECONDS = 300.0  # a busy machine needs minutes to import MLflow
STOP_SECONDS = 20.0
POLL = 0.2  # seconds
TAIL = 15  # lines of a dead service's log that are shown
MARK = "VISMEM_SERVICE_OF"  # a variable of every service: the folder that it works in


class NotYetError(Exception):
    """A service does not answer yet."""


@dataclass(frozen=True)
class Service:
    """One running server with its children."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    stop_signal: signal.Signals

    def check(self) -> None:
        """UserError where it has ended; the end of its log goes to stderr."""
        if (status := self.process.poll()) is None:
            return
        how = f"ended with status {status}" if status >= 0 else f"was killed by signal {-status}"
        raise self.failure(how)

    def wait_until(self, probe: Callable[[], None]) -> None:
        """Wait until the probe no longer raises NotYetError. UserError as `check`, and after five minutes."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            self.check()
            try:
                return probe()
            except NotYetError as error:
                if time.monotonic() > deadline:
                    raise self.failure(f"does not answer ({error})") from None
            time.sleep(POLL)

    def failure(self, what: str) -> UserError:
        """The error to raise, after the end of the log has been shown."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        for line in lines[-TAIL:]:
            print(f"  {line}", file=sys.stderr)
        return UserError(f"{self.name} {what}; its log is {self.log}")

    def stop(self) -> None:
        """End it with all its children."""
        self.process.send_signal(self.stop_signal)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """A block that SIGTERM ends in order, with status 143, so that what it started goes with it; main thread only."""
    if threading.current_thread() is not threading.main_thread():  # no other may say what a signal does
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def until_stopped(write: Callable[[str], None]) -> Iterator[None]:
    """A block that serves until Ctrl-C or SIGTERM: its own end is clean then, and `write` is told."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        write("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)


def start_service(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    *,
    stop_signal: signal.Signals = signal.SIGTERM,
    never_root: bool = False,
) -> Service:
    """Start a server that logs to `folder/logs/NAME.log`, in a process group of its own: Ctrl-C does not reach it.

    `environment` comes on top of ours, less what would lead it to other servers. For the rest see `with_parent`.
    """
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "MLFLOW_", "PG"))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            with_parent(command, stop_signal, never_root=never_root),
            env={**ours, **environment, MARK: str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Service(name, process, log, stop_signal)


def with_parent(command: Sequence[str], stop_signal: signal.Signals, *, never_root: bool = False) -> list[str]:
    """The command under util-linux's `setpriv`, so that it gets `stop_signal` when this process dies, even by SIGKILL.

    `never_root` is for a program that refuses to run as root: where we are, it runs as `nobody`, with the right to
    reach folders that are root's. UserError where that cannot be done.
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
    """`nobody` where we are root, else None."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def end_leftovers(folder: Path) -> None:
    """End what still runs there after a kill: with `setpriv` hardly anything, without it every service."""
    import psutil

    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder):
                process.send_signal(signal.SIGINT)
                left.append(process)
    for process in psutil.wait_procs(left, timeout=STOP_SECONDS)[1]:
        with suppress(psutil.Error):
            process.kill()


def free_ports(
    wanted: Mapping[str, int], inner: Iterable[str] = (), *, host: str = HOST, flag: str = "--{name}-port"
) -> dict[str, int]:
    """The ports by name, a free one for each 0 and for each of `inner`. UserError where one asked for is in use.

    `flag` says how a person chooses another; `{name}` in it is the port's name.
    """
    found: dict[str, int] = {}
    with ExitStack() as held:  # all at once, so that they differ
        for name, port in {**wanted, **dict.fromkeys(inner, 0)}.items():
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen()
            except OSError as error:
                raise UserError(
                    f"port {port} on {host} cannot be used ({error.strerror}): "
                    f"choose another with {flag.format(name=name)}, 0 for any free one"
                ) from None
            found[name] = listener.getsockname()[1]
    return found
