"""`vismem ui`: MLflow's server on the store, with the address of the model's page."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from vismem.config import Config
from vismem.errors import UserError, mask_credentials
from vismem.registry.tracking import open_store, tracking_uri
from vismem.services import HOST, free_ports

READY_SECONDS = 120.0


def serve_ui(config: Config, port: int, write: Callable[[str], None] = print) -> int:
    """Serve the store's pages until Ctrl-C; return 0. A store behind http needs no server: its address is printed.

    UserError where the port is in use or the server does not come up.
    """
    uri = tracking_uri(config.registry)
    if uri.startswith(("http://", "https://")):
        write(f"the model's page: {mask_credentials(model_page(config, uri))}")
        return 0
    with mlflow_server(config, port) as (address, server):
        write(f"the model's page: {model_page(config, address)}")
        write(f"MLflow serves {mask_credentials(uri)}; stop with Ctrl-C")
        try:
            server.wait()
        except KeyboardInterrupt:
            return 0
    raise UserError(f"the MLflow server on {address} ended by itself with status {server.returncode}")


@contextlib.contextmanager
def mlflow_server(config: Config, port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A running MLflow server on the store, local to this machine; yields its address and its process.

    It has answered before this enters, and is stopped with all its children on leaving.
    """
    port = free_ports({"ui": port}, flag="--port (registry.ui_port in params.yaml)")["ui"]
    store = open_store(config.registry)
    address = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store.uri, "--host", HOST]
    command += ["--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryDirectory(prefix="vismem-ui-") as folder:
        log = Path(folder) / "mlflow.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            _wait_until_ready(server, address, log)
            yield address, server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def model_page(config: Config, address: str) -> str:
    """The registered model's page in an MLflow server at `address`, such as http://127.0.0.1:5000."""
    return f"{address.rstrip('/')}/#/models/{config.registry.model_name}"


def _wait_until_ready(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        time.sleep(0.2)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:] or ["it said nothing"]
    raise UserError(f"the MLflow server did not come up on {address}: {said[0]}")
