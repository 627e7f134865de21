"""Starts a real tritonserver on a model repository, proves that it answers, and always stops it (`vismem serve`)."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from vismem.config import Config
from vismem.errors import UserError
from vismem.services import free_ports, until_stopped, with_parent
from vismem.serving.environment import find_serving_environment
from vismem.serving.probe import ask
from vismem.serving.repository import check_repository

PORTS = ("grpc", "http", "metrics")
# What lets a client run code on the server or read its memory and files: kept for those who know the secret.
RESTRICTED = "model-repository,shared-memory,trace,logging"


class TritonServer:
    """`with TritonServer(repository, log=FILE) as server: infer(server.grpc_url, ...)`.

    A port of 0 means any free one. Entering returns when every model of the repository has answered a real request;
    leaving stops the whole process group. If this process dies, the server is told to stop too.
    """

    def __init__(
        self,
        repository: Path,
        *,
        log: Path,
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        host: str = "127.0.0.1",
        ready_timeout: float = 180.0,
        exit_timeout: int = 5,
    ) -> None:
        self.repository = repository
        self.log = log
        self.host = host
        self.ports = dict(zip(PORTS, (grpc_port, http_port, metrics_port), strict=True))
        self.ready_timeout = ready_timeout  # seconds
        self.exit_timeout = exit_timeout  # seconds that running answers get to end in
        self.secret = secrets.token_hex(16)  # header `vismem-admin` of the restricted protocols
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: Path | None = None

    @property
    def grpc_url(self) -> str:
        """host:port for clients on this machine."""
        return f"{self._reach}:{self.ports['grpc']}"

    @property
    def models(self) -> list[str]:
        """The names of the models in the repository."""
        return sorted(file.parent.name for file in self.repository.glob("*/config.pbtxt"))

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running tritonserver. RuntimeError before the start and after the stop."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process

    @property
    def _reach(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    def __enter__(self) -> "TritonServer":
        """Start, wait and probe. UserError names a busy port or the log where the reason stands."""
        if not self.models:
            raise UserError(f"{self.repository} holds no model (no */config.pbtxt): run `vismem deploy` first")
        check_repository(self.repository)
        environment = find_serving_environment()
        flag = "--{name}-port (deploy.{name}_port in params.yaml)"
        self.ports = free_ports(self.ports, host=self.host, flag=flag)
        self._scratch = Path(tempfile.mkdtemp(prefix="vismem-triton-"))
        try:
            backends = environment.make_backend_folder(self._scratch)
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    with_parent(self._command(environment.binary, backends), signal.SIGTERM),
                    env=environment.variables(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._wait_until_ready()
            for model in self.models:
                self.probe(model)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def probe(self, model: str) -> None:
        """Ask for one token: a model whose Python process has died still says READY. UserError if none comes."""
        try:
            ask(self.grpc_url, model, self.ready_timeout)
        except UserError as error:
            raise UserError(f"the server started, but does not answer: {error}; its log is {self.log}") from None

    def stop(self) -> None:
        """Stop gracefully, then kill what is left of the process group; does nothing the second time."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self.exit_timeout + 10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def _command(self, binary: Path, backends: Path) -> list[str]:
        options = {
            "model-repository": self.repository,
            "backend-directory": backends,
            "model-control-mode": "none",
            "exit-timeout-secs": self.exit_timeout,
            "backend-config": f"python,stub-timeout-seconds={self.ready_timeout:.0f}",  # default: 30
            "grpc-restricted-protocol": f"{RESTRICTED}:vismem-admin={self.secret}",
            "http-restricted-api": f"{RESTRICTED}:vismem-admin={self.secret}",
        }
        for name, port in self.ports.items():
            options[f"{name}-port"] = port
            options[f"{name}-address"] = self.host
        return [str(binary), *(f"--{name}={value}" for name, value in options.items())]

    def _wait_until_ready(self) -> None:
        import tritonclient.grpc as triton
        from tritonclient.utils import InferenceServerException

        client = triton.InferenceServerClient(self.grpc_url)
        deadline = time.monotonic() + self.ready_timeout
        try:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise UserError(f"tritonserver ended while starting: {self._last_error()}; its log is {self.log}")
                try:
                    if client.is_server_ready(client_timeout=5):
                        return
                except InferenceServerException:
                    pass  # not listening yet
                time.sleep(0.1)
        finally:
            client.close()
        raise UserError(
            f"tritonserver was not ready after {self.ready_timeout:g} s: {self._last_error()}; its log is {self.log}"
        )

    def _last_error(self) -> str:
        """The line of the log that says most about what went wrong."""
        lines = self.log.read_text(errors="replace").splitlines() or ["it wrote nothing"]
        loading = [line for line in lines if "failed to load '" in line]
        others = [line for line in lines if re.match(r"E\d{4} |error: ", line)]
        line = (loading[:1] or others[-1:] or lines[-1:])[0]
        message = re.sub(r"^[EIW]\d{4} .*?\] ", "", line).strip('"')
        return message.split(r"\n\nAt:")[0][-400:]  # a Python error without its stack


def serve(
    config: Config,
    repository: Path,
    *,
    log: Path = Path("runs/tritonserver.log"),
    host: str = "127.0.0.1",
    grpc_port: int | None = None,
    http_port: int | None = None,
    metrics_port: int | None = None,
    write: Callable[[str], None] = print,
) -> None:
    """`vismem serve [--repository DIR] [--host H] [--grpc-port N] [--http-port N] [--metrics-port N]`.

    Serves the repository (the CLI's default: artifacts/deploy/model_repository) in the foreground until Ctrl-C,
    SIGTERM or the server's end. Ports not given are those of the deploy section. Raises UserError if the server
    cannot start, or ends by itself.
    """
    if not repository.is_dir():
        raise UserError(
            f"{repository} is not there: run `vismem deploy` (or `make demo`) first, or name another with --repository"
        )
    deploy = config.deploy
    server = TritonServer(
        repository,
        log=log,
        host=host,
        grpc_port=deploy.grpc_port if grpc_port is None else grpc_port,
        http_port=deploy.http_port if http_port is None else http_port,
        metrics_port=deploy.metrics_port if metrics_port is None else metrics_port,
    )
    with until_stopped(write), server:
        ports = f"HTTP port {server.ports['http']}, metrics port {server.ports['metrics']}"
        write(f"serving {', '.join(server.models)} on gRPC {server.grpc_url} ({ports})")
        write(f"log: {log}; stop with Ctrl-C")
        status = server.process.wait()
        raise UserError(f"tritonserver ended with status {status}: {server._last_error()}; its log is {log}")
