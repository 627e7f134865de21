"""Starts a real tritonserver on a model repository, proves that it answers, and always stops it (`vismem serve`)."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from vismem.config import Config
from vismem.errors import UserError
from vismem.services import HOST, Service, check_http, free_ports, start_service, until_stopped, watch
from vismem.serving.environment import find_serving_environment
from vismem.serving.probe import ask
from vismem.serving.repository import check_repository

READY_TIMEOUT = 180  # seconds
EXIT_TIMEOUT = 5  # seconds that running answers get to end in
# What lets a client run code on the server or read its memory and files is closed to everyone. Triton knows only a
# header as the key, and takes it from its command line, which every user of the machine can read. So this header has a
# name that no client can send: neither HTTP/1 nor HTTP/2 allows a line break in a name.
CLOSED = "model-repository,shared-memory,trace,logging:(closed to\nall clients)=none"


@dataclass(frozen=True)
class TritonServer:
    """A running server: every model of the repository has answered a real request."""

    repository: Path
    models: list[str]
    grpc_url: str  # host:port for clients on this machine
    ports: Mapping[str, int]  # grpc, http, metrics
    service: Service


@contextmanager
def triton_server(
    repository: Path, *, log: Path, ports: Mapping[str, int] | None = None, host: str = HOST
) -> Iterator[TritonServer]:
    """`with triton_server(repository, log=FILE) as server: Client(f"grpc://{server.grpc_url}").ask(...)`.

    `ports` of grpc, http and metrics, 0 or not given: any free one. Leaving stops the server with its children; if this
    process dies, the server gets SIGTERM. UserError names a damaged repository, a busy port, or the reason that the log
    gives.
    """
    models = sorted(file.parent.name for file in repository.glob("*/config.pbtxt"))
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
            "model-control-mode": "none",
            "exit-timeout-secs": EXIT_TIMEOUT,
            "backend-config": f"python,stub-timeout-seconds={READY_TIMEOUT}",  # default: 30
            "grpc-restricted-protocol": CLOSED,
            "http-restricted-api": CLOSED,
            **{f"{name}-port": port for name, port in ports.items()},
            **{f"{name}-address": host for name in ports},
        }
        command = [str(environment.binary), *(f"--{name}={value}" for name, value in options.items())]
        with start_service(
            "tritonserver",
            command,
            environment.variables(),
            log,
            stop_seconds=EXIT_TIMEOUT + 10,
            find_error=_find_error,
        ) as service:
            address = HOST if host == "0.0.0.0" else host
            url = f"{address}:{ports['grpc']}"
            service.wait_until(lambda: check_http(f"http://{address}:{ports['http']}/v2/health/ready"), READY_TIMEOUT)
            for model in models:  # one whose Python process has died still says READY
                try:
                    ask(url, model, READY_TIMEOUT)
                except UserError as error:
                    raise UserError(f"the server started, but does not answer: {error}; its log is {log}") from None
            yield TritonServer(repository, models, url, ports, service)


def _find_error(lines: Sequence[str]) -> str:
    """The first model that failed to load, else the last error; without time, place and Python's stack."""
    loading = [line for line in lines if "failed to load '" in line]
    others = [line for line in lines if re.match(r"E\d{4} |error: ", line)]
    line = (loading[:1] or others[-1:] or lines[-1:])[0]
    message = re.sub(r"^[EIW]\d{4} .*?\] ", "", line).strip('"')
    return message.split(r"\n\nAt:")[0][-400:]


def serve(
    config: Config,
    repository: Path,
    *,
    log: Path = Path("runs/tritonserver.log"),
    host: str = HOST,
    grpc_port: int | None = None,
    http_port: int | None = None,
    metrics_port: int | None = None,
    write: Callable[[str], None] = print,
) -> None:
    """`vismem serve [--repository DIR] [--host H] [--grpc-port N] [--http-port N] [--metrics-port N]`.

    Serves the repository (the CLI's default: artifacts/deploy/model_repository) in the foreground until Ctrl-C or
    SIGTERM. Ports not given are those of the deploy section. UserError if the server cannot start, or exits by itself.
    """
    if not repository.is_dir():
        hint = "run `vismem deploy` (or `make demo`) first, or name another with --repository"
        raise UserError(f"{repository} is not there: {hint}")
    asked = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
    ports = {"grpc": config.deploy.grpc_port, "http": config.deploy.http_port, "metrics": config.deploy.metrics_port}
    ports |= {name: port for name, port in asked.items() if port is not None}
    with until_stopped(write), triton_server(repository, log=log, host=host, ports=ports) as server:
        others = f"HTTP port {server.ports['http']}, metrics port {server.ports['metrics']}"
        write(f"serving {', '.join(server.models)} on gRPC {server.grpc_url} ({others})")
        write(f"log: {log}; stop with Ctrl-C")
        watch([server.service])
