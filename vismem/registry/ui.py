"""`vismem ui`: MLflow's server on the store, with the address of the model's page."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vismem.config import Config
from vismem.errors import mask_credentials
from vismem.registry.server import check_mlflow, mlflow_settings, start_mlflow
from vismem.registry.tracking import open_store, tracking_uri
from vismem.services import HOST, Service, free_ports, until_stopped, watch

LOG = Path("runs/mlflow-ui.log")


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


@contextmanager
def mlflow_server(config: Config, port: int, log: Path = LOG) -> Iterator[tuple[str, Service]]:
    """A running MLflow server on the store, for this machine only; yields its address and the service.

    It has answered before this enters, and is stopped with all its children on leaving.
    """
    port = free_ports({"ui": port}, flag="--port (registry.ui_port in params.yaml)")["ui"]
    store = open_store(config.registry)
    address = f"http://{HOST}:{port}"
    with start_mlflow(port, {**os.environ, **mlflow_settings(store.uri)}, log) as server:
        server.wait_until(lambda: check_mlflow(address))
        yield address, server


def model_page(config: Config, address: str) -> str:
    """The registered model's page in an MLflow server at `address`, such as http://127.0.0.1:5000."""
    return f"{address.rstrip('/')}/#/models/{config.registry.model_name}"
