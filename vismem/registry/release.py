"""The step `promote`, and rollback: each reads the ledger of champions, decides, and moves it, as one transaction.

Between reading the ledger and the move another may have been quicker: then a promoter judges again, against the new
champion. What a killed promotion left half done in MLflow, the next one, or `vismem models`, mends.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from vismem.config import Config
from vismem.errors import UserError
from vismem.records import RegisteredVersion, Release, Rule, Verdict
from vismem.registry.champion import mend_view, named_version, transact
from vismem.registry.ledger import Ledger, Move
from vismem.registry.runs import download_bundle
from vismem.registry.signing import SignatureError
from vismem.registry.tracking import Store, existing_store, find_version, open_store, translate_mlflow_errors
from vismem.registry.verdict import judge_version, publish_verdict, registered_gate
from vismem.registry.versions import Version


class NoEarlierError(UserError):
    """No champion before the present one is there to go back to."""


@translate_mlflow_errors()
def promote(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Judge the registered version again and make it champion if it passes; writes `release.json` and `verdict.json`.

    Figures and gate are those in the registry. A refusal is a result with its reasons. UserError where the store does
    not hold the version that was registered.
    """
    record = RegisteredVersion.read(inputs["register"])
    store = open_store(config.registry)
    version = find_version(store, record.version) if record.name == store.model else None
    if version is None or version.tags.get("manifest_sha256") != record.manifest_sha256:
        raise UserError(
            f"{store.uri} does not hold {record.name} version {record.version} as {inputs['register']} describes "
            "it: the store has changed since; run `vismem register` again"
        )
    return _promote(store, version, out)


@translate_mlflow_errors()
def promote_version(config: Config, which: str, unblock: bool = False) -> str:
    """The same for any registered version, by number or alias; `unblock` allows one that was rolled back from."""
    store = existing_store(config.registry)
    with tempfile.TemporaryDirectory() as out:
        return _promote(store, named_version(store, which), Path(out), unblock)


def _promote(store: Store, version: Version, out: Path, unblock: bool = False) -> str:
    verdict, gate = Verdict(passed=False, rules=()), registered_gate(store, version)
    unsigned = _unsigned(store, version)

    def decide(ledger: Ledger) -> Move | None:
        nonlocal verdict
        own = ledger.champion == version.version and ledger.means(version)
        made = ledger.promotion(version.version) if own else None
        if made and made.verdict:  # before, and perhaps by a run that was killed behind it
            rules = tuple(Rule(name=name, passed=True, reason=reason) for name, reason in made.verdict.items())
            verdict = Verdict(passed=True, rules=rules)
            return None
        verdict = judge_version(store, version, ledger, gate, unblock)
        if unsigned:
            verdict = Verdict(passed=False, rules=(*verdict.rules, unsigned))
        return ledger.next_move("promote", version, verdict) if verdict.passed and not made else None

    mend_view(store)
    ledger = transact(store, decide)
    mend_view(store)
    publish_verdict(store, version, verdict, out)
    move = ledger.promotion(version.version) if verdict.passed else None
    release = Release(
        promoted=verdict.passed,
        name=store.model,
        version=version.version,
        model_id=version.model_id,
        previous=move.previous if move else ledger.champion,
        reasons=verdict.reasons(),
        manifest_sha256=version.tags.get("manifest_sha256", ""),
    )
    release.write(out)
    if release.promoted:
        return f"{store.model} version {version.version} is champion"
    kept = f"version {ledger.champion} stays champion" if ledger.champion else "there is no champion yet"
    return f"{store.model} version {version.version} is refused, {kept}: {'; '.join(release.reasons)}"


def _unsigned(store: Store, version: Version) -> Rule | None:
    """The broken rule of a version that is not signed as the promoter's `registry.public_key` asks."""
    try:
        if store.config.public_key:
            with tempfile.TemporaryDirectory() as folder:
                download_bundle(store, version, Path(folder))
    except SignatureError as error:
        return Rule(name="signature", passed=False, reason=str(error))
    return None


@translate_mlflow_errors()
def rollback(config: Config, to: str | None = None, left: str | None = None) -> str:
    """Make the champion before the present one, or the earlier one `to`, champion again; return a line that says so.

    The version that is left is blocked: `promote` refuses it from then on. Without `to`, repeated calls go further back
    along the promotions; with it, a repeated call changes nothing, nor does one whose `left` is no longer champion.
    Versions that were deleted or are blocked are passed over. NoEarlierError where there is none, UserError where
    another moved the champion meanwhile: nothing is rolled back then.
    """
    store = existing_store(config.registry)
    seen = mend_view(store)

    def decide(ledger: Ledger) -> Move | None:
        if (to is not None and ledger.champion == to) or left not in (None, ledger.champion):
            return None
        if ledger != seen:
            raise UserError(
                f"version {ledger.champion} of '{store.model}' became champion meanwhile, instead of version "
                f"{seen.champion}: nothing was rolled back"
            )
        for number in ledger.earlier:
            version = ledger.own(find_version(store, number)) if to in (None, number) else None
            if version:
                return ledger.next_move("rollback", version)
        raise NoEarlierError(
            f"there is no earlier champion{f' {to}' if to else ''} of '{store.model}' in {store.uri} to go back to; "
            "`vismem models list` shows all"
        )

    ledger = transact(store, decide)
    mend_view(store)
    if ledger == seen or (left and left not in ledger.blocked):
        return f"{store.model} version {ledger.champion} is champion: nothing is to be rolled back"
    move = ledger.moves[-1]
    was = f"version {move.previous}, which is not promoted again"
    return f"{store.model} version {move.version} is champion again, instead of {was}"


@translate_mlflow_errors()
def delete(config: Config, which: str) -> str:
    """Delete a version and its bundle, whose files `mlflow gc` removes. UserError for a champion, past or present."""
    store = existing_store(config.registry)
    ledger, version = mend_view(store), named_version(store, which)
    if version.version in {move.version for move in ledger.moves}:
        raise UserError(f"{store.model} version {version.version} is or was champion: it is kept for rollbacks")
    store.client.delete_model_version(store.model, version.version)
    store.client.delete_logged_model(version.model_id)
    return f"{store.model} version {version.version} is deleted; its run {version.run_id} stays"
