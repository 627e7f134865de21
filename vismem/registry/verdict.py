"""Judges a registered version by what the registry holds of it, and publishes the verdict there."""

import math
import re
import tempfile
from pathlib import Path
from typing import TypeVar

from huggingface_hub import ModelCard
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from vismem.config import GateConfig
from vismem.data.profile import Profile
from vismem.errors import UserError, one_line
from vismem.provenance import sha256_file
from vismem.records import OVERALL, VISMEM, Metrics, ParityReport, Record, Rule, Validation, Verdict
from vismem.registry import BUNDLE
from vismem.registry.gate import DIGITS, Champion, judge
from vismem.registry.ledger import Ledger
from vismem.registry.runs import bundle_location
from vismem.registry.tracking import PROGRESS_BAR, Store, find_version
from vismem.registry.versions import Version
from vismem.services import environment

GATE = "gate"  # tag: the gate's parameters at registration, as JSON
# what a version, and its requests, are judged by, and the folder of its run that holds it; none: it is in the bundle
FOLDERS: dict[type[Record], str] = {
    Metrics: "evaluate", Validation: "validate", Profile: "validate", ParityReport: "",
}  # fmt: skip
LONGEST_PAGE = 5000  # characters of a version's description that MLflow's databases take
LINE, CUT = "\n\n---\n\n", f"\n\nThe rest of the card: `{BUNDLE}/README.md` of the version's files."
EVALUATION = "evaluation.json"  # of a version's run: its answers as a table of MLflow
REPORTS = {"scores": "evaluate/report.html", "answers": EVALUATION, "data": "validate/report.html"}
R = TypeVar("R", bound=Record)


class LostRecordError(UserError):
    """The store has lost a record that a version was registered with, or it is of a release that wrote others."""


def judge_version(store: Store, version: Version, ledger: Ledger, gate: GateConfig, unblock: bool = False) -> Verdict:
    """Judge by the figures that the version was registered with, against the ledger's champion.

    A version that was rolled back from is refused unless `unblock`. UserError where the registry has lost the figures,
    or they are others than were registered.
    """
    verdict = judge(
        read_registered(store, version, Metrics),
        read_registered(store, version, Validation),
        read_registered(store, version, ParityReport),
        _known(store, ledger, version),
        gate,
    )
    if unblock or (since := ledger.blocked_since(version)) is None:
        return verdict
    reason = (
        f"version {version.version} was rolled back from at {since} and is not promoted again by the same figures; "
        f"`vismem models promote {version.version} --unblock` does"
    )
    return Verdict(passed=False, rules=(*verdict.rules, Rule(name="blocked", passed=False, reason=reason)))


def registered_gate(store: Store, version: Version) -> GateConfig:
    """The gate's parameters that `register` judged the version by."""
    if GATE not in version.tags:
        raise UserError(f"{store.model} version {version.version} has no tag '{GATE}': run `vismem register` again")
    try:
        return GateConfig.model_validate_json(version.tags[GATE])
    except ValidationError:
        raise UserError(
            f"tag '{GATE}' of {store.model} version {version.version} is of another release of VisMem: "
            "run `vismem register` again"
        ) from None


def publish_verdict(store: Store, version: Version, verdict: Verdict, folder: Path, bundle: Path | None = None) -> None:
    """Write the verdict as tags of the version, as a file of its run, and into `folder`.

    The version's description says it too, above the model card of `bundle`, or else the card that is there.
    """
    client, name, number = store.client, store.model, version.version
    client.set_model_version_tag(name, number, "verdict", "passed" if verdict.passed else "refused")
    for rule in verdict.rules:
        text = f"{'passed' if rule.passed else 'broken'}: {rule.reason}"
        client.set_model_version_tag(name, number, f"verdict.{rule.name}", text)
    for key in version.tags.keys() - {"verdict", *(f"verdict.{rule.name}" for rule in verdict.rules)}:
        if key.startswith("verdict."):  # of a rule that no longer judges it
            client.delete_model_version_tag(name, number, key)
    client.update_model_version(name, number, description=_page(store, version, verdict, bundle))
    verdict.write(folder)
    client.log_artifact(version.run_id, str(folder / verdict.FILE))


def _page(store: Store, version: Version, verdict: Verdict, bundle: Path | None) -> str:
    """What the version's page shows: the verdict, links to its reports, and the model card as far as there is room."""
    tags, run = version.tags, store.client.get_run(version.run_id).info
    head = f"VisMem {tags['score']}, {float(tags['gain']):+.2f} points over vanilla (n = {tags['n']}). "
    head += "The gate passes it:" if verdict.passed else "The gate refuses it:"
    lines = [f"- {'✓' if rule.passed else '✗'} {rule.reason}" for rule in verdict.rules]
    place = f"#/experiments/{run.experiment_id}/runs/{version.run_id}/artifacts"
    links = " | ".join(f"[{name}]({place}/{file})" for name, file in REPORTS.items())
    if bundle and (bundle / "README.md").is_file():
        text = ModelCard((bundle / "README.md").read_text(), ignore_metadata_errors=True).text
        card = re.sub(r"<img[^>]*>\n*", "", text).strip()
    else:
        card = (store.client.get_model_version(store.model, version.version).description or "").partition(LINE)[2]
    page = "\n".join([head, "", *lines, "", links]) + LINE + card
    if len(page) > LONGEST_PAGE:
        page = page[: LONGEST_PAGE - len(CUT)].rpartition("\n")[0] + CUT
    return page


def _known(store: Store, ledger: Ledger, candidate: Version) -> Champion | None:
    """The ledger's champion by its registered figures; one deleted from MLflow, or its figures, has no usable score.

    Deleted is also one whose number a model made anew has given to another version.

    One from before hashes were kept has its tags only, as has one that `vismem register` did not make.
    """
    if ledger.champion is None:
        return None
    version = ledger.own(find_version(store, ledger.champion))
    tags = version.tags if version else {}
    if version and hash_tag(Metrics) in tags:
        try:
            tags = figure_tags(read_registered(store, version, Metrics))
        except LostRecordError:
            tags = {}
    try:
        score, n = float(tags["score"]), int(tags["n"])
    except (KeyError, ValueError):
        score, n = math.nan, 0
    return Champion(
        version=ledger.champion,
        overall=score,
        n=n,
        test_sha256=tags.get("test_sha256", ""),
        items_sha256=tags.get("items_sha256", ""),
        is_candidate=version is not None and version.version == candidate.version,
    )


def figure_tags(metrics: Metrics) -> dict[str, str]:
    """The tags of a version that say how it scored, and on what."""
    return {
        "test_sha256": metrics.test_sha256,
        "items_sha256": metrics.items_sha256,
        "n": str(metrics.n),
        "score": f"{metrics.arms[VISMEM][OVERALL]:.{DIGITS}f}",
        "gain": f"{metrics.gain[OVERALL].delta:.{DIGITS}f}",
    }


def read_registered(store: Store, version: Version, record: type[R]) -> R:
    """The record that the version was registered with.

    LostRecordError where it is lost or cannot be read, UserError where it is another than was registered.
    """
    folder, lost = FOLDERS[record], False
    path = f"{folder}/{record.FILE}" if folder else record.FILE
    try:
        if folder:
            location = str(store.client.get_run(version.run_id).info.artifact_uri)
        else:
            location = bundle_location(store, version)
        files = store.files(location)
        if path not in {found.path for found in files.list_artifacts(folder or None)}:
            lost = True  # the store says so: what it does not say now, it may say later
            raise UserError("it is not there")
        with tempfile.TemporaryDirectory() as here, environment({PROGRESS_BAR: "false"}):
            files.download_artifacts(path, here)
            if sha256_file(Path(here) / path) != version.tags.get(hash_tag(record)):
                raise UserError(f"its sha256 is not the version's tag {hash_tag(record)}")
            lost = True  # unless this release can read it
            return record.read(Path(here) / folder)
    except (MlflowException, OSError, UserError) as error:
        lost = lost or getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"
        raise (LostRecordError if lost else UserError)(
            f"{store.uri} does not hold a whole {path} of {store.model} version {version.version} "
            f"({one_line(error)}): run `vismem evaluate`, `vismem export` and `vismem register` again"
        ) from error


def hash_tag(record: type[Record]) -> str:
    """The version's tag that holds the sha256 of a record's file, such as metrics_json_sha256."""
    return f"{record.FILE.replace('.', '_')}_sha256"
