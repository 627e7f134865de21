"""Starts a real tritonserver on a model repository, proves that it answers, and always stops it (`vismem serve`)."""

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from vismem.config import Config
from vismem.errors import UserError
from vismem.services import HOST, NotYetError, Service, free_ports, start_service, until_stopped, watch
from vismem.serving.environment import find_serving_environment
from vismem.serving.probe import ask
from vismem.serving.repository import check_repository

READY_TIMEOUT = 180  # seconds
# What lets a client run code on the server or read its memory and files is closed to everyone. Triton knows only a
# header as the key, and takes it from its command line, which every user of the machine can read. So this header has a
# name that no client can send: neither HTTP/1 nor HTTP/2 allows a line break in a name.
CLOSED = "model-repository,shared-memory,trace,logging:(closed to\nall clients)=none"


class TritonServer:
    """`with TritonServer(repository, log=FILE) as server: infer(server.grpc_url, ...)`.

    A port of 0 means any free one. Entering returns when every model of the repository has answered a real request;
    leaving stops the server with its children. If this process dies, the server gets SIGTERM.
    """

    service: Service  # while it runs

    def __init__(
        self,
        repository: Path,
        *,
        log: Path,
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        host: str = HOST,
        exit_timeout: int = 5,
    ) -> None:
        """`exit_timeout`: seconds that running answers get to end in."""
        self.repository, self.log, self.host, self.exit_timeout = repository, log, host, exit_timeout
        self.ports = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        self._running = ExitStack()

    @property
    def grpc_url(self) -> str:
        """host:port for clients on this machine."""
        return f"{HOST if self.host == '0.0.0.0' else self.host}:{self.ports['grpc']}"

    @property
    def models(self) -> list[str]:
        """The names of the models in the repository."""
        return sorted(file.parent.name for file in self.repository.glob("*/config.pbtxt"))

    def __enter__(self) -> "TritonServer":
        """Start, wait and probe. UserError names a busy port, or the reason that the log gives."""
        if not self.models:
            raise UserError(f"{self.repository} holds no model (no */config.pbtxt): run `vismem deploy` first")
        check_repository(self.repository)
        environment = find_serving_environment()
        flag = "--{name}-port (deploy.{name}_port in params.yaml)"
        self.ports = free_ports(self.ports, host=self.host, flag=flag)
        with ExitStack() as running:
            scratch = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="vismem-triton-")))
            command = self._command(environment.binary, environment.make_backend_folder(scratch))
            variables, stop_seconds = environment.variables(), self.exit_timeout + 10
            self.service = running.enter_context(
                start_service(
                    "tritonserver", command, variables, self.log, stop_seconds=stop_seconds, find_error=_find_error
                )
            )
            self.service.wait_until(self._check_ready, READY_TIMEOUT)
            for model in self.models:
                self._probe(model)
            self._running = running.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _probe(self, model: str) -> None:
        """Ask for one token: a model whose Python process has died still says READY. UserError if none comes."""
        try:
            ask(self.grpc_url, model, READY_TIMEOUT)
        except UserError as error:
            raise UserError(f"the server started, but does not answer: {error}; its log is {self.log}") from None

    def _command(self, binary: Path, backends: Path) -> list[str]:
        options = {
            "model-repository": self.repository,
            "backend-directory": backends,
            "model-control-mode": "none",
            "exit-timeout-secs": self.exit_timeout,
            "backend-config": f"python,stub-timeout-seconds={READY_TIMEOUT}",  # default: 30
            "grpc-restricted-protocol": CLOSED,
            "http-restricted-api": CLOSED,
            **{f"{name}-port": port for name, port in self.ports.items()},
            **{f"{name}-address": self.host for name in self.ports},
        }
        return [str(binary), *(f"--{name}={value}" for name, value in options.items())]

    def _check_ready(self) -> None:
        import tritonclient.grpc as triton
        from tritonclient.utils import InferenceServerException

        with triton.InferenceServerClient(self.grpc_url) as client:
            try:
                ready = client.is_server_ready(client_timeout=5)
            except InferenceServerException as error:  # not listening yet
                raise NotYetError(str(error)) from None
        if not ready:
            raise NotYetError("its models are loading")


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
    asked = {"grpc_port": grpc_port, "http_port": http_port, "metrics_port": metrics_port}
    ports_asked = {name: getattr(config.deploy, name) if port is None else port for name, port in asked.items()}
    with until_stopped(write), TritonServer(repository, log=log, host=host, **ports_asked) as server:
        ports = f"HTTP port {server.ports['http']}, metrics port {server.ports['metrics']}"
        write(f"serving {', '.join(server.models)} on gRPC {server.grpc_url} ({ports})")
        write(f"log: {log}; stop with Ctrl-C")
        watch([server.service])
