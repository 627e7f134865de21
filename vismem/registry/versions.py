"""What a registered version is, and where the store is: for readers that do not import MLflow, which takes seconds."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vismem.config import RegistryConfig
from vismem.errors import UserError

SQLITE = "sqlite:///"
CHALLENGER, CHAMPION = "challenger", "champion"  # aliases


@dataclass(frozen=True)
class Version:
    """A registered model version."""

    version: str
    run_id: str
    model_id: str
    created: float  # seconds since 1970
    tags: Mapping[str, str]


def tracking_uri(config: RegistryConfig) -> str:
    """The store's address: the environment's MLFLOW_TRACKING_URI if set, else the parameter."""
    return os.environ.get("MLFLOW_TRACKING_URI") or config.tracking_uri


def database(uri: str) -> Path | None:
    """The file of a SQLite store, else None."""
    return Path(uri.removeprefix(SQLITE)).resolve() if uri.startswith(SQLITE) else None


def unknown_version(which: str, model: str, uri: str, versions: Iterable[Version]) -> UserError:
    """The error for a number or alias that no version of the model has."""
    known = ", ".join(item.version for item in versions)
    todo = "see `vismem models`" if known else "run `vismem repro`, or set MLFLOW_TRACKING_URI"
    why = "" if which != CHAMPION else "; there is none before the gate has passed a version"
    return UserError(f"no version or alias '{which}' of '{model}' in {uri}; versions: {known or 'none'}{why}: {todo}")
