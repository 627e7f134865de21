"""A thin wrapper over MLflow: the store, runs, and registered versions. Only `vismem/registry` imports mlflow.

MLflow gives a version's number as int on SQLite and as str over REST; here it is always str.
"""

import csv
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from vismem.config import RegistryConfig
from vismem.errors import UserError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a dead server is told in seconds, not minutes

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

P = ParamSpec("P")
R = TypeVar("R")
SQLITE = "sqlite:///"
METRICS_PER_REQUEST = 500
TAGS_PER_REQUEST = 100  # MLflow's limit, for parameters too
LONGEST_PARAM = 6000
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # seconds


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
    for noisy in ("alembic", "mlflow.store.db.utils"):  # a migration log on every new SQLite file
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
    with _impatient():
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


@contextmanager
def tracked_run(store: Store, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """A run that ends FINISHED, or FAILED where the block raises; yields its id.

    One with the same tags that still says RUNNING was left by a process that was killed: it ends KILLED.
    """
    experiment = experiment_id(store)
    same = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    for left in store.client.search_runs([experiment], f"attributes.status = 'RUNNING' and {same}"):
        store.client.set_terminated(left.info.run_id, "KILLED")
    run_id = str(store.client.create_run(experiment, tags=dict(tags), run_name=name).info.run_id)
    try:
        yield run_id
    except BaseException:
        store.client.set_terminated(run_id, "FAILED")
        raise
    store.client.set_terminated(run_id, "FINISHED")


def log_params(store: Store, run_id: str, values: Mapping[str, Any]) -> None:
    """Log a nested mapping as flat parameters, `stage1.batch_size` and so on."""
    flat = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in flatten(values, ".").items()]
    for start in range(0, len(flat), TAGS_PER_REQUEST):
        store.client.log_batch(run_id, params=flat[start : start + TAGS_PER_REQUEST])


def log_metrics(store: Store, run_id: str, model_id: str, values: Mapping[str, Any]) -> None:
    """Log the numbers of a nested mapping as `arms/vismem/overall` and so on, for the run and for the logged model."""
    now = int(time.time() * 1000)
    numbers = {key: value for key, value in flatten(values, "/").items() if isinstance(value, int | float)}
    metrics = [
        Metric(_metric_name(key), float(value), now, 0, model_id=model_id, run_id=run_id)
        for key, value in numbers.items()
    ]
    for start in range(0, len(metrics), METRICS_PER_REQUEST):
        store.client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])


def log_curve(store: Store, run_id: str, file: Path) -> None:
    """Log a stage's curve (CSV with a column `step`) as `stage1/reward` and so on, one value a step."""
    now = int(time.time() * 1000)
    with file.open(newline="") as lines:
        metrics = [
            Metric(_metric_name(f"{file.stem}/{name}"), float(value), now, int(row["step"]), run_id=run_id)
            for row in csv.DictReader(lines)
            for name, value in row.items()
            if name != "step" and value
        ]
    for start in range(0, len(metrics), METRICS_PER_REQUEST):
        store.client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])


def log_model_folder(store: Store, run_id: str, folder: Path, params: Mapping[str, str]) -> str:
    """Keep `folder` as a LoggedModel of plain files (nothing that unpickles); return its id."""
    model = store.client.create_logged_model(
        experiment_id(store), name=store.model, source_run_id=run_id, params=dict(params), model_type="vismem"
    )
    model_id = str(model.model_id)
    try:
        store.client.log_model_artifacts(model_id, str(folder))
    except BaseException:
        store.client.finalize_logged_model(model_id, "FAILED")
        raise
    store.client.finalize_logged_model(model_id, "READY")
    return model_id


def create_version(store: Store, run_id: str, model_id: str, tags: Mapping[str, str]) -> Version:
    """Register a logged model as the next version."""
    try:
        store.client.create_registered_model(
            store.model, description="Latent vision memory for a vision-language model"
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with _as_default(store.uri):
        made = store.client.create_model_version(
            store.model, f"models:/{model_id}", run_id=run_id, model_id=model_id, tags={**tags, "model_id": model_id}
        )
    return _version(made)


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


def flatten(values: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """`{"a": {"b": 1}, "c": [2, 3]}` as `{"a.b": 1, "c.0": 2, "c.1": 3}`; lists of plain words stay one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested: Mapping[str, Any] | None = None
        if isinstance(value, Mapping):
            nested = value
        elif isinstance(value, list) and value and not isinstance(value[0], str):
            nested = {str(index): item for index, item in enumerate(value)}
        if nested is None:
            flat[key] = value
        else:
            flat |= {f"{key}{separator}{below}": item for below, item in flatten(nested, separator).items()}
    return flat


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


@contextmanager
def _impatient() -> Iterator[None]:
    """Requests to MLflow fail within seconds, for a moment; else a server that hangs is given two minutes a try."""
    before = {name: os.environ.get(name) for name in IMPATIENT}
    os.environ.update(IMPATIENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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


def _metric_name(key: str) -> str:
    """MLflow allows letters, digits and `_-./: ` in a metric's name."""
    return "".join(char if char.isalnum() or char in "_-./: " else "_" for char in key)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
