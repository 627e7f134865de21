"""`vismem ui`: MLflow's server on the store, with the address of the model's page."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable

from vismem.config import Config
from vismem.errors import UserError
from vismem.registry.tracking import open_store, tracking_uri

HOST = "127.0.0.1"


def serve_ui(config: Config, port: int, write: Callable[[str], None] = print) -> int:
    """Serve the store's pages until Ctrl-C; return 0. A store behind http needs no server: its address is printed.

    UserError where the port is in use or the server cannot start.
    """
    uri = tracking_uri(config.registry)
    if uri.startswith(("http://", "https://")):
        write(f"the model's page: {model_page(config, uri)}")
        return 0
    port = free_port(port)
    store = open_store(config.registry)
    write(f"the model's page: {model_page(config, f'http://{HOST}:{port}')}")
    write(f"MLflow on {store.uri} starts in some seconds; stop with Ctrl-C")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store.uri, "--host", HOST]
    command += ["--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            status = server.wait()
        except BaseException as stopped:
            server.terminate()
            server.wait()
            if isinstance(stopped, KeyboardInterrupt):
                return 0
            raise
    raise UserError(f"the MLflow server ended with status {status}; what it said stands above")


def model_page(config: Config, address: str) -> str:
    """The registered model's page in an MLflow server at `address`, such as http://127.0.0.1:5000."""
    return f"{address.rstrip('/')}/#/models/{config.registry.model_name}"


def free_port(port: int) -> int:
    """The port itself if nobody listens there, any free one for 0. UserError where it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen()
        except OSError as error:
            raise UserError(
                f"port {port} on {HOST} cannot be used ({error.strerror}): choose another with --port "
                "(registry.ui_port in params.yaml), 0 for any free one"
            ) from None
        return int(probe.getsockname()[1])
