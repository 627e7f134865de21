"""Fetches what the store holds of a registered version: its bundle, its figures and its verdict."""

import tempfile
from pathlib import Path
from typing import Any, TypeVar

from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from vismem.errors import UserError
from vismem.provenance import MANIFEST, sha256_file, verify_manifest
from vismem.records import Metrics, ParityReport, Record, Validation, Verdict
from vismem.registry.tracking import Store, Version, plain_faults
from vismem.services import environment

R = TypeVar("R", bound=Record)


@plain_faults
def download_bundle(store: Store, version: Version, folder: Path) -> Path:
    """Put the bundle that `version` was registered with into `folder`, which must be there; return it.

    UserError where the store has lost it, or the files are not those that were registered.
    """
    _model_files(store, version).download_artifacts("", str(folder))
    problems = verify_manifest(folder)
    if not problems and sha256_file(folder / MANIFEST) != version.tags.get("manifest_sha256"):
        problems = [f"{MANIFEST} is another than was registered"]
    if problems:
        raise UserError(
            f"the files of {store.model} version {version.version} in {store.uri} are damaged: "
            f"{'; '.join(problems[:5])}"
        )
    return folder


def registered_figures(store: Store, version: Version) -> tuple[Metrics, Validation, ParityReport]:
    """What the version was registered with. UserError where the store has lost it or a field is missing."""
    run, model = _run_files(store, version), _model_files(store, version)
    return (
        _record(store, version, run, "evaluate", Metrics),
        _record(store, version, run, "validate", Validation),
        _record(store, version, model, "", ParityReport),
    )


def published_verdict(store: Store, version: Version) -> Verdict:
    """The verdict that was published last. UserError where the store has lost it."""
    return _record(store, version, _run_files(store, version), "", Verdict)


def _model_files(store: Store, version: Version) -> Any:
    location = store.client.get_logged_model(version.model_id).artifact_location
    return get_artifact_repository(location, store.uri, store.uri)


def _run_files(store: Store, version: Version) -> Any:
    location = store.client.get_run(version.run_id).info.artifact_uri
    return get_artifact_repository(location, store.uri, store.uri)


def _record(store: Store, version: Version, files: Any, folder: str, record: type[R]) -> R:
    path = f"{folder}/{record.FILE}".removeprefix("/")
    try:
        with tempfile.TemporaryDirectory() as here, environment({"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}):
            files.download_artifacts(path, here)
            return record.read(Path(here) / folder)
    except (MlflowException, OSError, UserError) as error:
        raise UserError(
            f"{store.uri} does not hold a whole {path} of {store.model} version {version.version} "
            f"({' '.join(str(error).split())}): "
            "run `vismem evaluate`, `vismem export` and `vismem register` again"
        ) from error
