"""A thin wrapper over MLflow: the store and registered versions.

MLflow gives a version's number as int on SQLite and as str over REST; here it is always str.
"""

import logging
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vismem.config import RegistryConfig
from vismem.errors import UserError, first_line
from vismem.registry import BUNDLE
from vismem.registry.versions import SQLITE, Version, database, tracking_uri
from vismem.services import environment

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is what a command says
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a dead server is reported in seconds, not minutes

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils import get_results_from_paginated_fn

CLIENTS = ("mlflow", "sqlalchemy", "botocore", "boto3", "requests", "urllib3")  # packages
PROGRESS_BAR = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"  # "false": none when files are fetched
LARGE_FILES = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "7200"}  # seconds: its server answers once a whole file is in the bucket
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # seconds, not minutes


@dataclass(frozen=True)
class Store:
    """An MLflow tracking and registry store, and the registered model that this project releases."""

    client: Any  # MlflowClient
    uri: str
    config: RegistryConfig

    @property
    def model(self) -> str:
        """The registered model's name."""
        return self.config.model_name

    @property
    def database(self) -> Path | None:
        """The file of a SQLite store, else None."""
        return database(self.uri)

    def files(self, location: str) -> Any:
        """MLflow's access to the files at the location of an experiment, a run or a logged model."""
        return get_artifact_repository(location, self.client.tracking_uri, self.client.tracking_uri)


@contextmanager
def translate_mlflow_errors() -> Iterator[None]:
    """Turn what MLflow says within the block or function (a server gone, a name refused) into a one-line UserError.

    So is what its clients of databases, of S3 and of HTTP say.
    """
    try:
        yield
    except Exception as error:
        if not of_a_store(error):
            raise
        raise UserError(f"MLflow: {first_line(error)}; what was done so far stays, and can be done again") from error


def of_a_store(error: Exception) -> bool:
    """Whether MLflow or a client that it uses has raised the error, or a database's driver is missing."""
    return isinstance(error, ModuleNotFoundError) or type(error).__module__.partition(".")[0] in CLIENTS


def open_store(config: RegistryConfig) -> Store:
    """Open the store. UserError where it does not answer or MLflow refuses its kind (plain folders)."""
    # migrations, instant "waiting", an example that is checked
    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry", "mlflow.pyfunc"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    uri = whole = tracking_uri(config)
    if (file := database(uri)) is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = f"{SQLITE}{file}"  # MLflow keeps what it opened by its address, also when the folder is another by now
    try:
        client = MlflowClient(tracking_uri=whole, registry_uri=whole)
        client.search_experiments(max_results=1)
    except Exception as error:
        if not of_a_store(error):
            raise
        raise UserError(
            f"the MLflow store {uri} does not answer ({first_line(error)}): "
            "check registry.tracking_uri or MLFLOW_TRACKING_URI"
        ) from None
    return Store(client, uri, config)


def existing_store(config: RegistryConfig) -> Store:
    """The same, but an absent SQLite store is not made: UserError."""
    uri = tracking_uri(config)
    if (file := database(uri)) and not file.is_file():
        where = "run in the project's folder, for a profile in runs/PROFILE"
        raise UserError(f"no MLflow registry {uri} here: {where}, or set MLFLOW_TRACKING_URI")
    return open_store(config)


def ping(config: RegistryConfig) -> str:
    """Open the store, and put and delete a small file where its experiment's files go; return what answered.

    UserError within seconds where something does not.
    """
    with environment(IMPATIENT):
        store = open_store(config)
        try:
            location = store.client.get_experiment(experiment_id(store)).artifact_location
            files = store.files(location)
            with tempfile.TemporaryDirectory() as folder:
                probe = Path(folder) / f"vismem-preflight-{uuid.uuid4().hex}"
                probe.write_text(probe.name)
                files.log_artifact(str(probe))
            files.delete_artifacts(probe.name)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  the client library of whatever store the files are in
            raise UserError(f"the MLflow store {store.uri} answers, but takes no files ({first_line(error)})") from None
    return f"{store.uri} answers and takes files at {location}"


def experiment_id(store: Store) -> str:
    """The experiment's id; it is made at first use, with its files beside a SQLite store or where a parameter says."""
    name, location = store.config.experiment, store.config.artifact_location
    if (known := store.client.get_experiment_by_name(name)) is not None:
        if known.lifecycle_stage != "active":
            raise UserError(f"MLflow experiment '{name}' is deleted: restore it, or set registry.experiment to another")
        return str(known.experiment_id)
    if location is None and store.database:
        location = str(store.database.with_name("mlartifacts"))
    if location is not None and "://" not in location:
        location = Path(location).resolve().as_uri()
    try:
        return str(store.client.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return experiment_id(store)  # another process was quicker


def tag_is(key: str, value: str) -> str:
    """The clause for a tag's value in a search for runs; it may hold either kind of quote, not both."""
    quote = '"' if "'" in value else "'"
    return f"tags.`{key}` = {quote}{value}{quote}"


def create_version(store: Store, run_id: str, model_id: str, tags: Mapping[str, str]) -> Version:
    """Register a logged model as the next version."""
    create_model_once(store, store.model, "Latent vision memory for a vision-language model")
    tags = {**tags, "model_id": model_id, BUNDLE: BUNDLE}
    # a SQL registry looks up models:/ID there, not at its own
    with environment({"MLFLOW_TRACKING_URI": store.client.tracking_uri}):
        made = store.client.create_model_version(
            store.model, f"models:/{model_id}", run_id=run_id, model_id=model_id, tags=tags
        )
    return _version(made)


def create_model_once(store: Store, name: str, description: str) -> None:
    """Create a registered model unless it exists."""
    try:
        store.client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def versions(store: Store, model: str | None = None) -> list[Version]:
    """Registered versions of the store's model, or of another one; newest first."""
    name = f"name='{model or store.model}'"
    found = get_results_from_paginated_fn(
        lambda size, token: store.client.search_model_versions(name, size, page_token=token), 1000
    )
    return sorted(map(_version, found), key=lambda item: int(item.version), reverse=True)


def find_version(store: Store, which: str) -> Version | None:
    """The version with that number or alias, or None. Deleting a version silently drops its aliases."""
    look = store.client.get_model_version if which.isdecimal() else store.client.get_model_version_by_alias
    try:
        return _version(look(store.model, which))
    except MlflowException as error:
        # a missing alias is INVALID_PARAMETER_VALUE, a missing model or version RESOURCE_DOES_NOT_EXIST
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _version(item: Any) -> Version:
    tags = {str(key): str(value) for key, value in (item.tags or {}).items()}
    return Version(
        version=str(item.version),
        run_id=str(item.run_id or ""),
        model_id=str(item.model_id or tags.get("model_id", "")),  # a SQL registry forgets the field, not the tag
        created=float(item.creation_timestamp or 0) / 1000,
        tags=tags,
    )
