"""The step `register`: a bundle becomes an MLflow run and a model version (alias `challenger`), judged by the gate."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vismem.config import Config
from vismem.errors import UserError
from vismem.provenance import MANIFEST, sha256_file, sha256_folder, verify_manifest
from vismem.registry.gate import Champion, Verdict, judge
from vismem.registry.tracking import (
    Store,
    Version,
    aliased,
    create_version,
    log_curve,
    log_metrics,
    log_model_folder,
    log_params,
    open_store,
    plain_faults,
    tracked_run,
    versions,
)

CHALLENGER, CHAMPION = "challenger", "champion"


@plain_faults
def register(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Register the bundle `inputs["export"]` and judge it; writes `version.json` and `verdict.json` into `out`.

    A bundle whose files do not match its manifest is refused (UserError) before anything is written to the store. A
    bundle that is registered already keeps its version; it is judged again, since gate and champion may have changed.
    A refusal by the gate is a result, not an error.
    """
    bundle, evaluate, validate = inputs["export"], inputs["evaluate"], inputs["validate"]
    if problems := verify_manifest(bundle):
        raise UserError(
            f"the bundle {bundle} is damaged: {', '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}; run `vismem export` again"
        )
    metrics, validation = _read(evaluate / "metrics.json"), _read(validate / "validation.json")
    if missing := {"vanilla", "vismem"} - set(metrics["arms"]):
        raise UserError(
            f"{evaluate / 'metrics.json'} has no arm {' or '.join(sorted(missing))}, which the gate compares: "
            "name both in evaluate.arms and run `vismem evaluate` again"
        )
    parity, lineage = _read(bundle / "parity.json"), _read(bundle / "lineage.json")
    if metrics.get("stage2_sha256") != lineage.get("inputs_sha256", {}).get("stage2"):
        raise UserError(
            f"{evaluate / 'metrics.json'} holds the scores of another model than the bundle {bundle}: "
            "run `vismem evaluate`, then `vismem export`, and register again"
        )
    test_sha256 = sha256_folder(validate / "data" / "test", "*.parquet")
    tags = version_tags(bundle, lineage, metrics, test_sha256)

    store = open_store(config.registry)
    known = versions(store, {"manifest_sha256": tags["manifest_sha256"]})
    version = known[0] if known else _new_version(store, config, inputs, metrics, tags)
    champion = _champion(aliased(store, CHAMPION), version)
    verdict = judge(metrics, validation, parity, champion, config.gate, test_sha256)

    _write(out / "verdict.json", asdict(verdict))
    record = {
        "name": store.model,
        "version": version.version,
        "run_id": version.run_id,
        "model_id": version.model_id,
        "manifest_sha256": tags["manifest_sha256"],
        "judged_against": champion.version if champion else None,
    }
    _write(out / "version.json", record)
    _publish_verdict(store, version, verdict, metrics, out)
    broken = [rule.name for rule in verdict.rules if not rule.passed]
    judged = "the gate passes it" if verdict.passed else f"the gate refuses it ({', '.join(broken)})"
    return f"{store.model} version {version.version} {'(registered before) ' if known else ''}as challenger: {judged}"


def version_tags(
    bundle: Path, lineage: Mapping[str, Any], metrics: Mapping[str, Any], test_sha256: str
) -> dict[str, str]:
    """What a version says about itself: where it came from, and the score by which it is compared later."""
    git = lineage.get("git") or {}
    params = json.dumps(lineage.get("params"), sort_keys=True).encode()
    return {
        "git_commit": str(git.get("commit") or "unknown"),
        "git_dirty": str(git.get("dirty", "unknown")).lower(),
        "data_sha256": str(lineage.get("data_sha256") or "unknown"),
        "params_sha256": hashlib.sha256(params).hexdigest(),
        "manifest_sha256": sha256_file(bundle / MANIFEST),
        "test_sha256": test_sha256,
        "n": str(metrics["n"]),
        "score": f"{metrics['arms']['vismem']['overall']:.4f}",
        "gain": f"{metrics['gain']['overall']['delta']:.4f}",
    }


def _new_version(
    store: Store, config: Config, inputs: Mapping[str, Path], metrics: Mapping[str, Any], tags: Mapping[str, str]
) -> Version:
    run_tags = {**tags, "mlflow.source.git.commit": tags["git_commit"], "mlflow.source.name": "vismem register"}
    with tracked_run(store, f"{store.model} {tags['manifest_sha256'][:8]}", run_tags) as run_id:
        log_params(store, run_id, config.model_dump(mode="json", by_alias=True))
        for path in sorted(inputs["evaluate"].iterdir()):
            if path.name != "predictions":  # one row an item and arm: too much to be looked at there
                _log_path(store, run_id, path, "evaluate")
        for name in ("report.html", "validation.json"):
            _log_path(store, run_id, inputs["validate"] / name, "validate")
        model_id = log_model_folder(store, run_id, inputs["export"], {"base": config.base.model})
        numbers = {name: metrics[name] for name in ("n", "arms", "gain", "overhead") if name in metrics}
        log_metrics(store, run_id, model_id, numbers)
        for curve in sorted((inputs["export"] / "training").glob("*.csv")):
            log_curve(store, run_id, curve)
        return create_version(store, run_id, model_id, tags)


def _log_path(store: Store, run_id: str, path: Path, folder: str) -> None:
    if path.is_dir():
        store.client.log_artifacts(run_id, str(path), f"{folder}/{path.name}")
    elif path.is_file():
        store.client.log_artifact(run_id, str(path), folder)


def _champion(champion: Version | None, candidate: Version) -> Champion | None:
    if champion is None:
        return None
    tags = champion.tags
    if "score" not in tags:
        raise UserError(
            f"the present champion, version {champion.version}, has no tag 'score': it was not registered by "
            "`vismem register`; give it tags score, n and test_sha256, or remove its alias"
        )
    return Champion(
        version=champion.version,
        overall=float(tags["score"]),
        n=int(tags.get("n", 0)),
        test_sha256=tags.get("test_sha256", ""),
        is_candidate=champion.version == candidate.version,
    )


def _publish_verdict(store: Store, version: Version, verdict: Verdict, metrics: Mapping[str, Any], out: Path) -> None:
    """The verdict as tags and description of the version and as a file of its run; the alias last."""
    client, name, number = store.client, store.model, version.version
    client.set_model_version_tag(name, number, "verdict", "passed" if verdict.passed else "refused")
    for rule in verdict.rules:
        text = f"{'passed' if rule.passed else 'broken'}: {rule.reason}"
        client.set_model_version_tag(name, number, f"verdict.{rule.name}", text)
    arms, lines = metrics["arms"], [f"- {'✓' if rule.passed else '✗'} {rule.reason}" for rule in verdict.rules]
    headline = (
        f"VisMem {arms['vismem']['overall']:.2f}, vanilla {arms['vanilla']['overall']:.2f} (n = {metrics['n']}). "
    )
    word = "The gate passes it:" if verdict.passed else "The gate refuses it:"
    client.update_model_version(name, number, description="\n".join([headline + word, "", *lines]))
    client.log_artifact(version.run_id, str(out / "verdict.json"))
    client.set_registered_model_alias(name, CHALLENGER, number)


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `vismem {path.parent.name}` again") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): run `vismem {path.parent.name}` again") from None
    return values


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
