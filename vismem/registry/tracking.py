"""A thin wrapper over MLflow: the store and registered versions. Only `vismem/registry` imports mlflow.

MLflow gives a version's number as int on SQLite and as str over REST; here it is always str.
"""

import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from vismem.config import RegistryConfig
from vismem.errors import UserError
from vismem.services import environment

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a dead server is reported in seconds, not minutes

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

P = ParamSpec("P")
R = TypeVar("R")
SQLITE = "sqlite:///"
CHALLENGER, CHAMPION = "challenger", "champion"  # aliases
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # seconds, not minutes


@dataclass(frozen=True)
class Version:
    """A registered model version."""

    version: str
    run_id: str
    model_id: str
    created: float  # seconds since 1970
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Store:
    """An open MLflow tracking and registry store, and the registered model that this project releases."""

    client: Any  # MlflowClient
    uri: str
    config: RegistryConfig

    @property
    def model(self) -> str:
        """The registered model's name."""
        return self.config.model_name


def tracking_uri(config: RegistryConfig) -> str:
    """The store's address: the environment's MLFLOW_TRACKING_URI if set, else the parameter."""
    return os.environ.get("MLFLOW_TRACKING_URI") or config.tracking_uri


def plain_faults(function: Callable[P, R]) -> Callable[P, R]:
    """Turn what MLflow says in the midst of `function` (a server gone, a name refused) into a one-line UserError."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except MlflowException as error:
            raise UserError(
                f"MLflow: {_first_line(error)}; what was done so far stays, and can be done again"
            ) from error

    return wrapped


def open_store(config: RegistryConfig) -> Store:
    """Open the store. UserError where it does not answer or MLflow refuses its kind (plain folders)."""
    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry"):  # migrations, instant "waiting"
        logging.getLogger(noisy).setLevel(logging.WARNING)
    uri = tracking_uri(config)
    if uri.startswith(SQLITE):
        Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise UserError(
            f"the MLflow store {uri} does not answer ({_first_line(error)}): "
            "check registry.tracking_uri or MLFLOW_TRACKING_URI"
        ) from None
    return Store(client, uri, config)


def ping(config: RegistryConfig) -> str:
    """Open the store, and put and delete a small file where its experiment's files go; return what answered.

    UserError within seconds where something does not.
    """
    with environment(IMPATIENT):
        store = open_store(config)
        try:
            experiment = store.client.get_experiment(experiment_id(store))
            files = get_artifact_repository(experiment.artifact_location, store.uri, store.uri)
            with tempfile.TemporaryDirectory() as folder:
                probe = Path(folder) / f"vismem-preflight-{uuid.uuid4().hex}"
                probe.write_text(probe.name)
                files.log_artifact(str(probe))
            files.delete_artifacts(probe.name)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  the client library of whatever store the files are in
            raise UserError(
                f"the MLflow store {store.uri} answers, but takes no files ({_first_line(error)})"
            ) from None
    return f"{store.uri} answers and takes files at {experiment.artifact_location}"


def experiment_id(store: Store) -> str:
    """The experiment's id; it is made at first use, with its files beside a SQLite store or where a parameter says."""
    name = store.config.experiment
    if (known := store.client.get_experiment_by_name(name)) is not None:
        if known.lifecycle_stage != "active":
            raise UserError(f"MLflow experiment '{name}' is deleted: restore it, or set registry.experiment to another")
        return str(known.experiment_id)
    location = store.config.artifact_location
    if location is None and store.uri.startswith(SQLITE):
        location = "mlartifacts"
        database = Path(store.uri.removeprefix(SQLITE)).resolve()
        location = (database.parent / location).as_uri()
    elif location is not None and "://" not in location:
        location = Path(location).resolve().as_uri()
    return str(store.client.create_experiment(name, artifact_location=location))


def create_version(store: Store, run_id: str, model_id: str, tags: Mapping[str, str]) -> Version:
    """Register a logged model as the next version."""
    create_model_once(store, store.model, "Latent vision memory for a vision-language model")
    with _as_default(store.uri):
        made = store.client.create_model_version(
            store.model, f"models:/{model_id}", run_id=run_id, model_id=model_id, tags={**tags, "model_id": model_id}
        )
    return _version(made)


def create_model_once(store: Store, name: str, description: str) -> None:
    """Create a registered model unless it exists."""
    try:
        store.client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def versions(store: Store, filter_tags: Mapping[str, str] | None = None) -> list[Version]:
    """Registered versions, newest first; with `filter_tags` those that carry all of them."""
    found: list[Version] = []
    token: str | None = None
    while True:
        page = store.client.search_model_versions(f"name='{store.model}'", max_results=1000, page_token=token)
        found += [_version(item) for item in page]
        token = page.token
        if not token:
            break
    wanted = (filter_tags or {}).items()
    matching = [item for item in found if all(item.tags.get(key) == value for key, value in wanted)]
    return sorted(matching, key=lambda item: int(item.version), reverse=True)


def get_version(store: Store, version: str) -> Version | None:
    """The version with that number, or None where it is not there (any more)."""
    return _or_none(lambda: _version(store.client.get_model_version(store.model, version)))


def aliased(store: Store, alias: str) -> Version | None:
    """The version that an alias names, or None. Deleting a version silently drops its aliases."""
    return _or_none(lambda: _version(store.client.get_model_version_by_alias(store.model, alias)))


@contextmanager
def _as_default(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's global store for a moment: SQL registries look up `models:/ID` there, whatever the client."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri("")
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # set_tracking_uri writes it, and open_store lets it win
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _version(item: Any) -> Version:
    tags = {str(key): str(value) for key, value in (item.tags or {}).items()}
    return Version(
        version=str(item.version),
        run_id=str(item.run_id or ""),
        model_id=str(item.model_id or tags.get("model_id", "")),  # a SQL registry forgets the field, not the tag
        created=float(item.creation_timestamp or 0) / 1000,
        tags=tags,
    )


def _or_none(look: Callable[[], Version]) -> Version | None:
    try:
        return look()
    except MlflowException as error:
        # a missing alias is INVALID_PARAMETER_VALUE, a missing model or version RESOURCE_DOES_NOT_EXIST
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
