"""Looks at what is registered: a version's files against all that is said of them, and two versions side by side."""

import math
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from vismem.config import Config
from vismem.data.profile import Profile, Trained, counts
from vismem.errors import UserError
from vismem.files import read_json
from vismem.provenance import file_hashes
from vismem.records import OVERALL, VISMEM, Metrics
from vismem.registry.champion import mend_view, named_version, read_view
from vismem.registry.datasets import run_revisions
from vismem.registry.register import version_tags
from vismem.registry.runs import download_bundle
from vismem.registry.tracking import PROGRESS_BAR, existing_store, translate_mlflow_errors, versions
from vismem.registry.verdict import EVALUATION, FOLDERS, read_registered
from vismem.services import environment


@translate_mlflow_errors()
def verify(config: Config, which: str) -> str:
    """Fetch a version's files and hash them again; return a line that says so.

    Held to each other are the files, their manifest, the lineage in it, the figures of the version's run and the
    version's tags. The line also names versions that were champions and that somebody deleted in MLflow. UserError that
    names what differs.
    """
    store = existing_store(config.registry)
    lost = {move.version for move in mend_view(store).moves} - {item.version for item in read_view(store).versions}
    if which in lost:
        raise UserError(f"version {which} of '{store.model}' was champion, and somebody deleted it in MLflow")
    version = named_version(store, which)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder)
        download_bundle(store, version, bundle)
        metrics = read_registered(store, version, Metrics)
        for record in FOLDERS.keys() - {Metrics}:
            read_registered(store, version, record)
        lineage: dict[str, Any] = read_json(bundle / "lineage.json")
        told = version_tags(bundle, lineage, metrics)
        files = len(file_hashes(bundle))
    tags = version.tags
    wrong = [f"tag {key} says {tags.get(key)}, the files {of}" for key, of in told.items() if tags.get(key) != of]
    if metrics.stage2_sha256 != lineage["inputs_sha256"]["stage2"]:
        wrong.append("the scores are of another model than the lineage's")
    if store.client.get_run(version.run_id).info.lifecycle_stage == "deleted":
        wrong.append(f"its run is deleted, `mlflow runs restore --run-id {version.run_id}` before `mlflow gc` runs")
    if wrong:
        raise UserError(f"{store.model} version {version.version} is not as registered: {'; '.join(wrong)}")
    return (
        f"{store.model} version {version.version} is as registered: {files} files and their manifest "
        f"{told['manifest_sha256'][:12]}, lineage, figures and tags agree"
        + (", and registry.public_key's owner signed it" if config.registry.public_key else "")
        + (f"; of the champions before, deleted in MLflow: {', '.join(sorted(lost, key=int))}" if lost else "")
    )


@translate_mlflow_errors()
def trained(config: Config, which: str) -> Trained:
    """What a version was trained on and how it answered. UserError where the registry has lost it."""
    store = existing_store(config.registry)
    version = named_version(store, which)
    newest, data = versions(store)[0], version.tags.get("data_sha256")
    other = newest.tags.get("data_sha256") != data and int(newest.version) > int(version.version)
    profile, run = read_registered(store, version, Profile), store.client.get_run(version.run_id)
    with tempfile.TemporaryDirectory() as folder, environment({PROGRESS_BAR: "false"}):
        store.files(str(run.info.artifact_uri)).download_artifacts(EVALUATION, folder)
        answers = pd.read_json(Path(folder) / EVALUATION, orient="split").query("arm == @VISMEM")
    return Trained(
        version.version,
        version.tags["manifest_sha256"],
        profile,
        counts(answers["tokens"]),
        counts(answers["memories"]),
        f"version {newest.version} is newer, and was trained on other data" if other else None,
        run_revisions(run),
    )


@translate_mlflow_errors()
def compare(config: Config, first: str, second: str) -> tuple[list[dict[str, str]], str]:
    """One row per figure of two versions with their difference, and a sentence on whether the figures compare."""
    store = existing_store(config.registry)
    versions = [named_version(store, which) for which in (first, second)]
    if versions[0] == versions[1]:
        raise UserError(f"{first} and {second} are both version {versions[0].version}: name two versions")
    one, other = metrics = [read_registered(store, version, Metrics) for version in versions]
    columns = [f"version {version.version}" for version in versions]
    ours, theirs = one.arms[VISMEM], other.arms[VISMEM]
    figures = {name: (ours[name], theirs[name]) for name in ours if name in theirs}
    figures["gain over vanilla"] = (one.gain[OVERALL].delta, other.gain[OVERALL].delta)
    rows = [
        {
            "figure": name.replace("_", " "),
            **{column: f"{value:.3f}" for column, value in zip(columns, values, strict=True)},
            "difference": f"{values[1] - values[0]:+.3f}" if all(map(math.isfinite, values)) else "",
        }
        for name, values in figures.items()
    ]
    data = {(figures.n, figures.test_sha256, figures.items_sha256) for figures in metrics}
    if len(data) == 1:
        return rows, f"both were scored on the same {one.n} items"
    return rows, f"they were scored on other data ({one.n} and {other.n} items): their scores do not compare"
