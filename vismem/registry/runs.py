"""What the store keeps of a version beside its tags: a run with parameters, metrics and curves, and the bundle."""

import csv
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from vismem.errors import UserError, mask_credentials
from vismem.provenance import MANIFEST, origin_tags, sha256_file, verify_manifest
from vismem.records import Metrics, portable
from vismem.registry import BUNDLE, GIVEN_RUN, LIVE_RUN
from vismem.registry.signing import check_signature
from vismem.registry.tracking import LARGE_FILES, Store, experiment_id, tag_is, translate_mlflow_errors
from vismem.registry.versions import Version
from vismem.services import environment

LONGEST_PARAM = 6000

Point = tuple[str, float, int, int]  # a metric's name, value, step and time (ms since 1970)


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


@contextmanager
def tracked_run(store: Store, name: str, tags: Mapping[str, str], params: Mapping[str, Any]) -> Iterator[str]:
    """A run with these tags and parameters that ends FINISHED, or FAILED where the block raises; yields its id.

    It is the live run of `vismem repro` where there is one with the same parameters, else the one that was given to us,
    which whoever opened it names and ends; a new one where there is neither, or it holds figures. One with the
    same tags that still says RUNNING was left by a process that was killed: it ends KILLED.
    """
    experiment = experiment_id(store)
    same = " and ".join(tag_is(key, value) for key, value in tags.items() if not {"'", '"'} <= {*value})
    given = _open_run(store, os.environ.get(GIVEN_RUN))
    for left in store.client.search_runs([experiment], f"attributes.status = 'RUNNING' and {same}"):
        if left.info.run_id != given:
            store.client.set_terminated(left.info.run_id, "KILLED")
    run_id = _live_run(store, experiment, params) or given
    if run_id is None or _holds_figures(store, run_id):
        run_id = str(store.client.create_run(experiment, tags=dict(tags), run_name=name).info.run_id)
    outcome = "FAILED"
    try:
        if run_id != given:
            store.client.update_run(run_id, name=name)
        for key, value in {**tags, **origin_tags()}.items():
            store.client.set_tag(run_id, key, value)
        log_params(store, run_id, params)
        yield run_id
        outcome = "FINISHED"
    finally:
        if run_id != given:
            store.client.set_terminated(run_id, outcome)


def _holds_figures(store: Store, run_id: str) -> bool:
    """Whether a bundle's are in the run: another's would take the place of those that judge it, or mix with them."""
    files = store.files(str(store.client.get_run(run_id).info.artifact_uri))
    return f"evaluate/{Metrics.FILE}" in {found.path for found in files.list_artifacts("evaluate")}


def _open_run(store: Store, run_id: str | None) -> str | None:
    """The id, if this store has a run of it that is open."""
    try:
        return run_id if run_id and store.client.get_run(run_id).info.status == "RUNNING" else None
    except MlflowException:
        return None  # in another store


def _live_run(store: Store, experiment: str, params: Mapping[str, Any]) -> str | None:
    """The id of the run that `vismem repro` has opened in this store, unless its parameters have changed since."""
    if (run_id := _open_run(store, os.environ.get(LIVE_RUN))) is None:
        return None
    run = store.client.get_run(run_id)
    return run_id if run.info.experiment_id == experiment and run.data.params == _shown_params(params) else None


def log_params(store: Store, run_id: str, values: Mapping[str, Any]) -> None:
    """Log a nested mapping as flat parameters, `stage1.batch_size` and so on, without credentials."""
    params = [Param(key, value) for key, value in _shown_params(values).items()]
    store.client.log_batch(run_id, params=params)  # the client keeps to MLflow's limits per request


def _shown_params(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: mask_credentials(str(value))[:LONGEST_PARAM] for key, value in flatten(values, ".").items()}


def log_metrics(store: Store, run_id: str, model_id: str, values: Mapping[str, Any]) -> None:
    """Log the numbers of a nested mapping as `arms/vismem/overall` and so on, for the run and for the logged model."""
    found = flatten(values, "/").items()
    numbers = [(portable(key), float(value), 0, now()) for key, value in found if isinstance(value, int | float)]
    log_points(store, run_id, numbers, model_id)


def log_curve(store: Store, run_id: str, file: Path) -> None:
    """Log a stage's curve (CSV with a column `step`) as `stage1/reward` and so on, one value per step.

    What a live run has of it already is not logged twice.
    """
    points = read_curve(file)
    known = {name for name, *_ in points} & store.client.get_run(run_id).data.metrics.keys()
    logged = {(name, point.step) for name in known for point in store.client.get_metric_history(run_id, name)}
    log_points(store, run_id, [point for point in points if (point[0], point[2]) not in logged])


def read_curve(file: Path) -> list[Point]:
    """The points of a stage's curve, as of when the file was last written."""
    written = int(file.stat().st_mtime * 1000)
    with file.open(newline="") as lines:
        return [
            (f"{file.stem}/{name}", float(value), int(row["step"]), written)
            for row in csv.DictReader(line for line in lines if line.endswith("\n"))  # a last one may be half written
            for name, value in row.items()
            if name != "step" and value
        ]


def bundle_location(store: Store, version: Version) -> str:
    """Where a version's bundle is; one that VisMem 0.2 registered has no folder of its own."""
    location = str(store.client.get_logged_model(version.model_id).artifact_location)
    return f"{location}/{BUNDLE}" if BUNDLE in version.tags else location


@translate_mlflow_errors()
def download_bundle(store: Store, version: Version, folder: Path) -> None:
    """Put the bundle that `version` was registered with into `folder`, which must be there.

    UserError where the store has lost it, or the files are not those that were registered; see `check_signature`.
    """
    with environment(LARGE_FILES):
        store.files(bundle_location(store, version)).download_artifacts("", str(folder))
    problems = verify_manifest(folder)
    if not problems and sha256_file(folder / MANIFEST) != version.tags.get("manifest_sha256"):
        problems = [f"{MANIFEST} is another than was registered"]
    if problems:
        raise UserError(
            f"the files of {store.model} version {version.version} in {store.uri} are damaged: "
            f"{'; '.join(problems[:5])}"
        )
    check_signature(store, version, folder)


def flatten(values: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """`{"a": {"b": 1}, "c": [2, 3]}` as `{"a.b": 1, "c.0": 2, "c.1": 3}`; lists of plain words stay one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and not isinstance(value[0], str):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            flat |= {f"{key}{separator}{below}": item for below, item in flatten(value, separator).items()}
        else:
            flat[key] = value
    return flat


def log_points(store: Store, run_id: str, points: Sequence[Point], model_id: str | None = None) -> None:
    """Log points. MLflow allows letters, digits and `_-./: ` in a name."""
    metrics = [
        Metric(re.sub(r"[^\w\-./: ]", "_", name), value, when, step, model_id=model_id, run_id=run_id)
        for name, value, step, when in points
    ]
    if metrics:
        store.client.log_batch(run_id, metrics=metrics)
