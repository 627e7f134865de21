"""Starts a real tritonserver on a model repository, proves that it answers, and always stops it."""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from vismem.errors import UserError
from vismem.runtime.access import SHARED_MEMORY, own_token
from vismem.services import DRAIN_VARIABLE, HOST, POLL, Service, check_http, free_ports, start_service
from vismem.serving.environment import find_serving_environment
from vismem.serving.probe import ask, ask_unary
from vismem.serving.repository import MANIFEST_VARIABLE, check_repository, is_unary, unary_name

READY_TIMEOUT = int(os.environ.get("VISMEM_READY_SECONDS", "180"))  # that a server and its models get to load in
DRAIN_SECONDS = float(os.environ.get(DRAIN_VARIABLE, "0"))
EXIT_TIMEOUT = 5  # seconds that running answers get to end in
STOP_VARIABLE = "VISMEM_STOP_FILE"  # of a file that tells the models' processes to end their answers
# What lets a client run code on the server or read its memory and files is closed to everyone. Triton knows only a
# header as the key, and takes it from its command line, which every user of the machine can read. So this header has a
# name that no client can send: neither HTTP/1 nor HTTP/2 allows a line break in a name.
CLOSED = "model-repository,shared-memory,trace,logging:(closed to\nall clients)=none"


@dataclass(frozen=True)
class TritonServer:
    """A running server: every model of the repository has answered a real request."""

    repository: Path
    models: list[str]  # without those of clients that take no stream
    grpc_url: str  # host:port for clients on this machine
    http_url: str  # http://host:port for them
    metrics_url: str
    ports: Mapping[str, int]  # grpc, http, metrics
    service: Service


@contextmanager
def triton_server(
    repository: Path,
    *,
    log: Path,
    ports: Mapping[str, int] | None = None,
    host: str = HOST,
    tls: tuple[Path, Path] | None = None,
) -> Iterator[TritonServer]:
    """`with triton_server(repository, log=FILE) as server: Client(f"grpc://{server.grpc_url}").ask(...)`.

    `ports` of grpc, http and metrics, 0 or not given: any free one. `tls`: a certificate and its key, PEM, for gRPC;
    Triton's HTTP and metrics know no TLS, and then listen on this machine alone. Clients must send the token of
    `own_token`, if there is one. It loads what changes in `repository`, and a model serves on where that fails. Leaving
    ends the running answers with an error, and stops the server with its children; if this process dies, the server
    gets SIGTERM. UserError names a damaged repository, a busy port, or the reason that the log gives.
    """
    models = [name for name in model_names(repository) if not is_unary(name)]
    if not models:
        raise UserError(f"{repository} holds no model (no */config.pbtxt): run `vismem deploy` first")
    check_repository(repository)
    environment = find_serving_environment()
    flag = "--{name}-port (deploy.{name}_port in params.yaml)"
    ports = free_ports({"grpc": 0, "http": 0, "metrics": 0} | dict(ports or {}), host=host, flag=flag)
    with TemporaryDirectory(prefix="vismem-triton-") as scratch:
        options = {
            "model-repository": repository,
            "backend-directory": environment.make_backend_folder(Path(scratch)),
            # Triton looks for changes itself: a client that may tell it could load any code, see CLOSED. What is pinned
            # does not change, and it would not ask for the pin.
            "model-control-mode": "none" if os.environ.get(MANIFEST_VARIABLE) else "poll",
            "repository-poll-secs": 1,
            "exit-timeout-secs": EXIT_TIMEOUT,
            "grpc-restricted-protocol": CLOSED,
            "http-restricted-api": CLOSED,
            **{f"{name}-port": port for name, port in ports.items()},
            **{f"{name}-address": host if name == "grpc" or not tls else HOST for name in ports},
        }
        if own_token():
            options |= {f"{name}-header-forward-pattern": "(?i)^authorization$" for name in ("grpc", "http")}
        if tls:
            options |= {"grpc-use-ssl": "true", "grpc-server-cert": tls[0], "grpc-server-key": tls[1]}
        shared, stop = f"vismem_{os.getpid()}_{ports['grpc']}_", Path(scratch) / "stop"
        backend = {"stub-timeout-seconds": READY_TIMEOUT, "shm-region-prefix-name": shared}  # default: 30
        command = [str(environment.binary), *(f"--{name}={value}" for name, value in options.items())]
        command += [f"--backend-config=python,{name}={value}" for name, value in backend.items()]
        service = start_service(
            "tritonserver",
            command,
            environment.variables() | {STOP_VARIABLE: str(stop)},
            log,
            stop_seconds=EXIT_TIMEOUT + 10,
            find_error=find_error,
        )
        with ExitStack() as ends:
            ends.callback(_remove_shared_memory, shared)
            ends.enter_context(service)
            ends.callback(stop.touch)  # the models' processes end running answers: Triton would wait, and abort
            address = HOST if host == "0.0.0.0" else host
            http, metrics = (f"http://{HOST if tls else address}:{ports[name]}" for name in ("http", "metrics"))
            grpc = f"{address}:{ports['grpc']}"
            service.wait_until(lambda: check_http(f"{http}/v2/health/ready"), READY_TIMEOUT)
            for model in models:  # one whose Python process has died still says READY
                try:
                    if tls:  # for another name than this machine's, it may be
                        ask_unary(http, unary_name(model), READY_TIMEOUT)
                    else:
                        ask(grpc, model, READY_TIMEOUT)
                except UserError as error:
                    raise UserError(f"the server started, but does not answer: {error}; its log is {log}") from None
            if DRAIN_SECONDS:
                ends.callback(_drain, Path(scratch), repository, service)
            yield TritonServer(repository, models, grpc, http, f"{metrics}/metrics", ports, service)


def _drain(scratch: Path, repository: Path, service: Service) -> None:
    """Let running answers end, for DRAIN_SECONDS at most; the models' processes refuse new questions meanwhile.

    A server that has ended, or was killed since it did not answer, has none.
    """
    (scratch / "drain").touch()
    end = time.monotonic() + DRAIN_SECONDS
    models = [name for name in model_names(repository) if not is_unary(name)]  # a process each
    while time.monotonic() < end and len([*scratch.glob("idle-*")]) < len(models) and service.process.poll() is None:
        time.sleep(POLL)


def model_names(repository: Path) -> list[str]:
    """The models of a repository."""
    return sorted(file.parent.name for file in repository.glob("*/config.pbtxt"))


def _remove_shared_memory(prefix: str) -> None:
    """Remove what a server that was killed leaves."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def find_error(lines: Sequence[str]) -> str:
    """The first model that failed to load, else the last error; without time, place and Python's stack."""
    loading = [line for line in lines if "failed to load '" in line]
    others = [line for line in lines if re.match(r"E\d{4} |error: ", line)]
    line = (loading[:1] or others[-1:] or lines[-1:])[0]
    message = re.sub(r"^[EIW]\d{4} .*?\] ", "", line).strip('"')
    return message.split(r"\n\nAt:")[0][-400:]
