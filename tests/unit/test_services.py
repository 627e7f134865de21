"""Servers as child processes: none outlives the one who started it, none dies unnoticed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from vismem.errors import UserError
from vismem.services import (
    MARK,
    TERMINATED,
    NotYetError,
    Service,
    end_leftovers,
    free_ports,
    start_service,
    until_stopped,
    watch,
)

FOREVER = "import time; print('up', flush=True); time.sleep(600)"


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def said(service: Service, line: str) -> Callable[[], None]:
    def probe() -> None:
        if line not in service.log.read_text():
            raise NotYetError(f"no {line}")

    return probe


def test_a_stopped_service_takes_its_children_with_it(tmp_path: Path) -> None:
    program = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {FOREVER!r}]); print(p.pid); p.wait()"
    )
    service = start_service("one", [sys.executable, "-u", "-c", program], os.environ, tmp_path / "log")
    service.wait_until(said(service, "up"))
    child = int(next(line for line in service.log.read_text().splitlines() if line.isdigit()))
    assert running(child)
    service.stop()
    eventually(lambda: not running(child))
    assert service.process.poll() is not None


def test_a_dead_service_is_an_error_with_the_line_of_its_log_that_says_why(tmp_path: Path) -> None:
    program = "print('FATAL: no such disk'); print('shut down'); raise SystemExit(3)"
    service = start_service("one", python(program), os.environ, tmp_path / "logs" / "one.log")
    with pytest.raises(UserError, match=r"^one exited with status 3: FATAL: no such disk; its log is .*one\.log$"):
        service.wait_until(said(service, "up"))
    service.stop()


def test_a_service_that_is_never_ready_is_an_error_and_leaving_its_block_stops_it(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"^one was not ready after 0 s \(no such line\): it wrote nothing; its log"),
        start_service("one", python("import time; time.sleep(600)"), os.environ, tmp_path / "log") as service,
    ):
        service.wait_until(said(service, "such line"), seconds=0)
    assert service.process.poll() is not None


def test_a_service_that_exits_is_noticed_by_those_who_watch(tmp_path: Path) -> None:
    with start_service("one", python(FOREVER), os.environ, tmp_path / "one.log") as one:
        two = start_service("two", python("import os; os.kill(os.getpid(), 9)"), os.environ, tmp_path / "two.log")
        with pytest.raises(UserError, match=r"^two was killed by signal 9: it wrote nothing"):
            watch([one, two])


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs util-linux's setpriv")
def test_a_service_ends_when_the_one_who_started_it_is_killed(tmp_path: Path) -> None:
    starter = (
        "import os, sys, time; from pathlib import Path; from vismem.services import start_service; "
        f"s = start_service('one', [sys.executable, '-c', {FOREVER!r}], os.environ, Path({str(tmp_path / 'log')!r})); "
        "print(s.process.pid, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(python(starter), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    service = int(process.stdout.readline())
    log = tmp_path / "log"
    eventually(lambda: log.is_file() and "up" in log.read_text())
    process.kill()
    process.wait()
    process.stdout.close()
    eventually(lambda: not running(service))


def test_what_a_killed_run_left_in_a_folder_is_ended_and_nothing_else(tmp_path: Path) -> None:
    def start(folder: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            python(FOREVER), env={**os.environ, MARK: str(tmp_path / folder)}, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        return process

    ours, other = start("one"), start("other")
    end_leftovers(tmp_path / "one")
    ours.wait(60)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_ports_differ_and_one_in_use_is_named_with_its_option() -> None:
    found = free_ports(dict.fromkeys(("mlflow", "s3", "master", "volume"), 0))
    assert set(found) == {"mlflow", "s3", "master", "volume"}
    assert len(set(found.values())) == 4
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(UserError, match=r"cannot be used .* --mlflow-port, 0 for any free one"):
            free_ports({"mlflow": busy.getsockname()[1]})
    with pytest.raises(UserError, match=r"port 70000 on 127\.0\.0\.1 cannot be used \(.*0-65535.*--s3-port"):
        free_ports({"s3": 70000})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")
def test_a_program_that_refuses_root_runs_as_nobody_and_still_reaches_root_s_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("reached")
    (tmp_path / "file").chmod(0o600)
    tmp_path.chmod(0o700)
    program = f"import os; print(os.geteuid() != 0, open({str(tmp_path / 'file')!r}).read(), flush=True)"
    service = start_service(
        "one", python(program), os.environ, tmp_path / "log", stop_signal=signal.SIGINT, never_root=True
    )
    assert service.process.wait(60) == 0, service.log.read_text()
    assert service.log.read_text().strip() == "True reached"


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(TERMINATED)])
def test_what_serves_until_it_is_stopped_ends_without_an_error(end: BaseException) -> None:
    written: list[str] = []
    with until_stopped(written.append):
        raise end
    assert written == ["stopped"]


def test_what_ends_by_itself_was_not_stopped() -> None:
    written: list[str] = []
    with pytest.raises(SystemExit, match="3"), until_stopped(written.append):
        sys.exit(3)
    assert written == []


IPV6 = Path("/proc/net/if_inet6")
WITH_IPV6 = pytest.mark.skipif(not IPV6.is_file() or " lo" not in IPV6.read_text(), reason="needs IPv6")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("::1", marks=WITH_IPV6)])
def test_a_port_is_free_on_the_host_that_is_asked_for(host: str) -> None:
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    (port,) = free_ports({"http": 0}, host=host).values()
    refused = pytest.raises(UserError, match=f"port {port} on {host} cannot be used")
    with socket.create_server((host, port), family=family), refused:
        free_ports({"http": port}, host=host)
