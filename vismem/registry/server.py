"""MLflow's server as a child process, for `vismem ui` and `vismem stack`; the first serves the model's page."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vismem.config import Config
from vismem.errors import mask_credentials
from vismem.registry.tracking import open_store
from vismem.registry.versions import tracking_uri
from vismem.services import HOST, Service, check_http, free_ports, start_service, until_stopped, watch


def mlflow_command(port: int) -> list[str]:
    """The server's command. What is secret or differs between servers is in `mlflow_settings`."""
    return [sys.executable, "-m", "mlflow", "server", f"--host={HOST}", f"--port={port}", "--workers=1"]


def mlflow_settings(store: str, files: str | None = None) -> dict[str, str]:
    """The server's environment variables: its database and the place of clients' files, such as s3://BUCKET/mlflow.

    Files pass through the server, so that clients need no key of the bucket.
    """
    settings = {
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # processes for evaluations of prompts
    }
    return settings if files is None else {**settings, "MLFLOW_ARTIFACTS_DESTINATION": files}


def start_mlflow(port: int, environment: Mapping[str, str], log: Path) -> Service:
    """Start the server; `environment` holds `mlflow_settings`."""
    return start_service("mlflow", mlflow_command(port), environment, log, stop_seconds=10)


def check_mlflow(address: str) -> None:
    """Ask the server for an experiment. NotYetError where it does not answer, or not from its database."""
    check_http(f"{address}/api/2.0/mlflow/experiments/search?max_results=1")


@contextmanager
def mlflow_server(config: Config, port: int, log: Path = Path("runs/mlflow-ui.log")) -> Iterator[tuple[str, Service]]:
    """A running MLflow server on the store, for this machine only; yields its address and the service.

    It has answered before this enters, and is stopped with all its children on leaving.
    """
    port = free_ports({"ui": port}, flag="--port (registry.ui_port in params.yaml)")["ui"]
    store = open_store(config.registry)
    address = f"http://{HOST}:{port}"
    with start_mlflow(port, {**os.environ, **mlflow_settings(store.uri)}, log) as server:
        server.wait_until(lambda: check_mlflow(address))
        yield address, server


def serve_ui(config: Config, port: int, write: Callable[[str], None] = print) -> None:
    """Serve the store's pages until Ctrl-C or SIGTERM. A store behind http needs no server: its address is printed.

    UserError where the port is in use, or the server does not come up or exits by itself.
    """
    uri = tracking_uri(config.registry)
    if uri.startswith(("http://", "https://")):
        write(f"the model's page: {mask_credentials(model_page(config, uri))}")
        return
    with until_stopped(write), mlflow_server(config, port) as (address, server):
        write(f"the model's page: {model_page(config, address)}")
        write(f"MLflow serves {mask_credentials(uri)}; log: {server.log}; stop with Ctrl-C")
        watch([server])


def model_page(config: Config, address: str) -> str:
    """The registered model's page in an MLflow server at `address`, such as http://127.0.0.1:5000."""
    return f"{address.rstrip('/')}/#/models/{config.registry.model_name}"
