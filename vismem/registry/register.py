"""The step `register`: a bundle becomes an MLflow run and a model version (alias `challenger`), judged by the gate."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from vismem.config import Config
from vismem.data.profile import Profile
from vismem.data.revisions import read_revisions, revision_tags, revisions_of
from vismem.errors import UserError
from vismem.files import read_json
from vismem.provenance import MANIFEST, origin_tags, sha256_file, sha256_folder, verify_manifest
from vismem.records import VANILLA, VISMEM, Metrics, ParityReport, RegisteredVersion, Validation, portable
from vismem.registry.champion import mend_view
from vismem.registry.datasets import log_revisions
from vismem.registry.mlmodel import log_bundle
from vismem.registry.runs import log_curve, log_metrics, tracked_run
from vismem.registry.signing import sign_bundle
from vismem.registry.tracking import Store, create_version, open_store, translate_mlflow_errors, versions
from vismem.registry.verdict import EVALUATION, FOLDERS, GATE, figure_tags, hash_tag, judge_version, publish_verdict
from vismem.registry.versions import CHALLENGER, Version

TABLE = "question_id arm benchmark task capability cluster correct tokens memories question answer reference"


@translate_mlflow_errors()
def register(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Register the bundle `inputs["export"]` and judge it; writes `version.json` and `verdict.json` into `out`.

    UserError, before anything is written to the store, where the bundle does not match its manifest, or bundle, scores
    and test data do not belong together. A bundle that is registered already keeps its version and the figures of then;
    it is judged again, since gate and champion may have changed. A refusal by the gate is a result, not an error.
    """
    metrics, lineage = _checked(inputs)
    tags = version_tags(inputs["export"], lineage, metrics)
    for record, folder in FOLDERS.items():
        tags[hash_tag(record)] = sha256_file(inputs[folder or "export"] / record.FILE)
    signature = sign_bundle(config.registry, inputs["export"], out)
    store = open_store(config.registry)
    named, hashed = ("manifest_sha256", tags["manifest_sha256"]), set(map(hash_tag, FOLDERS))
    known = next((v for v in versions(store) if named in v.tags.items() and hashed <= v.tags.keys()), None)
    version = known or _new_version(store, config, inputs, metrics, tags)
    if signature:
        store.client.log_model_artifact(version.model_id, str(signature))
    ledger = mend_view(store)
    verdict = judge_version(store, version, ledger, config.gate)

    RegisteredVersion(
        name=store.model,
        version=version.version,
        run_id=version.run_id,
        model_id=version.model_id,
        manifest_sha256=tags["manifest_sha256"],
        judged_against=ledger.champion,
    ).write(out)
    store.client.set_model_version_tag(store.model, version.version, GATE, config.gate.model_dump_json())
    publish_verdict(store, version, verdict, out, inputs["export"])
    store.client.set_registered_model_alias(store.model, CHALLENGER, version.version)
    broken = [rule.name for rule in verdict.rules if not rule.passed]
    judged = "the gate passes it" if verdict.passed else f"the gate refuses it ({', '.join(broken)})"
    return f"{store.model} version {version.version} {'(registered before) ' if known else ''}as challenger: {judged}"


def _checked(inputs: Mapping[str, Path]) -> tuple[Metrics, dict[str, Any]]:
    """Scores and lineage, after checking that all inputs are whole and belong together."""
    bundle, evaluate, validate = inputs["export"], inputs["evaluate"], inputs["validate"]
    if problems := verify_manifest(bundle):
        raise UserError(
            f"the bundle {bundle} is damaged: {', '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}; run `vismem export` again"
        )
    metrics = Metrics.read(evaluate)
    Validation.read(validate)
    Profile.read(validate)
    ParityReport.read(bundle)
    lineage: dict[str, Any] = read_json(bundle / "lineage.json", "run `vismem export` again")
    if missing := {VANILLA, VISMEM} - set(metrics.arms):
        raise UserError(
            f"the scores in {evaluate} have no arm {' or '.join(sorted(missing))}, which the gate compares: "
            "name both in evaluate.arms and run `vismem evaluate` again"
        )
    if metrics.stage2_sha256 != (lineage.get("inputs_sha256") or {}).get("stage2"):
        raise UserError(
            f"{evaluate} holds the scores of another model than the bundle {bundle}: "
            "run `vismem evaluate`, then `vismem export`, and register again"
        )
    if metrics.test_sha256 != sha256_folder(validate / "data" / "test", "*.parquet"):
        raise UserError(f"{evaluate} holds scores on other test data than {validate}: run `vismem evaluate` again")
    return metrics, lineage


def version_tags(bundle: Path, lineage: Mapping[str, Any], metrics: Metrics) -> dict[str, str]:
    """What a version says about itself: where it came from, and the score by which it is compared later."""
    git = lineage.get("git") or {}
    params = json.dumps(lineage.get("params"), sort_keys=True).encode()
    return {
        "git_commit": str(git.get("commit") or "unknown"),
        "git_dirty": str(git.get("dirty", "unknown")).lower(),
        "data_sha256": str(lineage.get("data_sha256") or "unknown"),
        "params_sha256": hashlib.sha256(params).hexdigest(),
        "manifest_sha256": sha256_file(bundle / MANIFEST),
        **revision_tags(revisions_of(lineage)),
        **figure_tags(metrics),
    }


def _new_version(
    store: Store, config: Config, inputs: Mapping[str, Path], metrics: Metrics, tags: Mapping[str, str]
) -> Version:
    run_tags = {**tags, "mlflow.source.git.commit": tags["git_commit"], "mlflow.source.name": "vismem register"}
    params = config.model_dump(mode="json", by_alias=True)
    table = evaluation_table(inputs["evaluate"], metrics.arms)
    with tracked_run(store, f"{store.model} {tags['manifest_sha256'][:8]}", run_tags, params) as run_id:
        for path in sorted(inputs["evaluate"].iterdir()):
            if path.name != "predictions":  # they are the table
                store.client.log_artifact(run_id, str(path), "evaluate")
        store.client.log_table(run_id, table, EVALUATION)
        for name in ("report.html", Validation.FILE, Profile.FILE):
            store.client.log_artifact(run_id, str(inputs["validate"] / name), "validate")
        model_id = log_bundle(store, run_id, inputs["export"], inputs["validate"] / "data" / "test", config.base)
        log_revisions(store, run_id, read_revisions(inputs["validate"]))
        log_metrics(store, run_id, model_id, metrics.model_dump(include={"n", "arms", "gain", "overhead"}))
        for curve in sorted((inputs["export"] / "training").glob("*.csv")):
            log_curve(store, run_id, curve)
        return create_version(store, run_id, model_id, {**tags, **origin_tags()})


def evaluation_table(evaluate: Path, arms: Iterable[str]) -> pd.DataFrame:
    """One row per arm and question: what it is about, the answer, whether it is correct, its tokens and memories.

    UserError where the step `evaluate` did not leave an arm's predictions.
    """
    files = {arm: evaluate / "predictions" / f"{portable(arm)}.parquet" for arm in arms}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise UserError(f"no predictions {', '.join(missing)}: run `vismem evaluate` again")
    rows = pd.concat([pd.read_parquet(file).assign(arm=arm) for arm, file in files.items()], ignore_index=True)
    rows = rows.assign(correct=rows["score"] == 1.0, memories=rows["invocations"].map(len))
    renamed = {"id": "question_id", "source": "benchmark", "answer_length": "tokens", "text": "answer"}
    return rows.rename(columns=renamed)[TABLE.split()]
