"""MLflow's server as a child process: its one command and its settings, for `vismem ui` and `vismem stack`."""

import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from vismem.services import HOST, NotYetError, Service, start_service


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
    try:
        urllib.request.urlopen(f"{address}/api/2.0/mlflow/experiments/search?max_results=1", timeout=5).close()
    except OSError as error:  # refused, timed out, or an HTTP error
        raise NotYetError(str(error)) from None
