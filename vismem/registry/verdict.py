"""Judges a registered version by what the registry holds of it, and publishes the verdict there."""

import math
import tempfile
from pathlib import Path
from typing import TypeVar

from mlflow.exceptions import MlflowException

from vismem.config import GateConfig
from vismem.errors import UserError
from vismem.records import Metrics, ParityReport, Record, Validation, Verdict
from vismem.registry.gate import Champion, judge
from vismem.registry.tracking import Store
from vismem.registry.versions import Version
from vismem.services import environment

GATE = "gate"  # tag: the gate's parameters at registration, as JSON
R = TypeVar("R", bound=Record)


def judge_version(store: Store, version: Version, champion: Version | None, gate: GateConfig) -> Verdict:
    """Judge by the figures that the version was registered with. UserError where the registry has lost them."""
    run, model = _run_files(store, version), store.client.get_logged_model(version.model_id).artifact_location
    metrics = _read(store, version, run, Metrics, "evaluate")
    validation = _read(store, version, run, Validation, "validate")
    parity = _read(store, version, model, ParityReport)
    return judge(metrics, validation, parity, _known(champion, version), gate)


def registered_gate(store: Store, version: Version) -> GateConfig:
    """The gate's parameters that `register` judged the version by."""
    if GATE not in version.tags:
        raise UserError(f"{store.model} version {version.version} has no tag '{GATE}': run `vismem register` again")
    return GateConfig.model_validate_json(version.tags[GATE])


def published_verdict(store: Store, version: Version) -> Verdict:
    """The verdict that was published last. UserError where the store has lost it."""
    return _read(store, version, _run_files(store, version), Verdict)


def publish_verdict(store: Store, version: Version, verdict: Verdict, folder: Path) -> None:
    """Write the verdict as tags and description of the version, as a file of its run, and into `folder`."""
    client, name, number = store.client, store.model, version.version
    client.set_model_version_tag(name, number, "verdict", "passed" if verdict.passed else "refused")
    for rule in verdict.rules:
        text = f"{'passed' if rule.passed else 'broken'}: {rule.reason}"
        client.set_model_version_tag(name, number, f"verdict.{rule.name}", text)
    tags = version.tags
    head = f"VisMem {tags['score']}, {float(tags['gain']):+.2f} points over vanilla (n = {tags['n']}). "
    head += "The gate passes it:" if verdict.passed else "The gate refuses it:"
    lines = [f"- {'✓' if rule.passed else '✗'} {rule.reason}" for rule in verdict.rules]
    client.update_model_version(name, number, description="\n".join([head, "", *lines]))
    verdict.write(folder)
    client.log_artifact(version.run_id, str(folder / verdict.FILE))


def _known(champion: Version | None, candidate: Version) -> Champion | None:
    """The champion by its tags; one that was not registered by `vismem register` has no usable score."""
    if champion is None:
        return None
    tags = champion.tags
    try:
        score, n = float(tags["score"]), int(tags["n"])
    except (KeyError, ValueError):
        score, n = math.nan, 0
    return Champion(
        version=champion.version,
        overall=score,
        n=n,
        test_sha256=tags.get("test_sha256", ""),
        items_sha256=tags.get("items_sha256", ""),
        is_candidate=champion.version == candidate.version,
    )


def _run_files(store: Store, version: Version) -> str:
    return str(store.client.get_run(version.run_id).info.artifact_uri)


def _read(store: Store, version: Version, location: str, record: type[R], folder: str = "") -> R:
    path = f"{folder}/{record.FILE}".removeprefix("/")
    try:
        with tempfile.TemporaryDirectory() as here, environment({"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}):
            store.files(location).download_artifacts(path, here)
            return record.read(Path(here) / folder)
    except (MlflowException, OSError, UserError) as error:
        raise UserError(
            f"{store.uri} does not hold a whole {path} of {store.model} version {version.version} "
            f"({' '.join(str(error).split())}): run `vismem evaluate`, `vismem export` and `vismem register` again"
        ) from error
