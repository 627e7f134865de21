"""The champion pointer: the step `promote`, and rollback.

An MLflow alias is last-writer-wins and has no history, so every move is written down first, as a tag of its own on the
registered model (`champion_history.TIME`: JSON with version, previous, action). Nothing rewrites such a tag.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from vismem.config import Config
from vismem.errors import UserError
from vismem.records import RegisteredVersion, Release
from vismem.registry.lock import promotion_lock
from vismem.registry.tracking import Store, find_version, open_store, translate_mlflow_errors, versions
from vismem.registry.verdict import judge_version, publish_verdict, published_verdict, registered_gate
from vismem.registry.versions import CHAMPION, HISTORY, Move, moves


@translate_mlflow_errors()
def promote(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Judge the registered version again and make it champion if it passes; writes `release.json` and `verdict.json`.

    Figures and gate are those in the registry; no other promotion runs meanwhile. A refusal is a result with its
    reasons. UserError where the store does not hold the version that was registered.
    """
    record = RegisteredVersion.read(inputs["register"])
    store = open_store(config.registry)
    with promotion_lock(store) as check_held:
        version = find_version(store, record.version) if record.name == store.model else None
        if version is None or version.tags.get("manifest_sha256") != record.manifest_sha256:
            raise UserError(
                f"{store.uri} does not hold {record.name} version {record.version} as {inputs['register']} describes "
                "it: the store has changed since; run `vismem register` again"
            )
        champion = find_version(store, CHAMPION)
        if champion is not None and champion.version == version.version:  # also after a kill behind the move
            previous = _predecessor(history(store), version.version)
            verdict = published_verdict(store, version)
            verdict.write(out)
        else:
            previous = champion.version if champion else None
            verdict = judge_version(store, version, champion, registered_gate(store, version))
            publish_verdict(store, version, verdict, out)
            if verdict.passed:
                check_held()
                _move(store, "promote", version.version, previous)
    release = Release(
        promoted=verdict.passed,
        name=store.model,
        version=version.version,
        model_id=version.model_id,
        previous=previous,
        reasons=verdict.reasons(),
    )
    release.write(out)
    if release.promoted:
        return f"{store.model} version {version.version} is champion"
    kept = f"version {champion.version} stays champion" if champion else "there is no champion yet"
    return f"{store.model} version {version.version} is refused, {kept}: {'; '.join(release.reasons)}"


@translate_mlflow_errors()
def rollback(config: Config) -> str:
    """Give the champion alias back to the version before the present one; return a line that says so.

    Repeated calls go further back along the promotions. Where the champion's version was deleted (which drops the
    alias), the last champion that still exists returns. UserError where there is none.
    """
    store = open_store(config.registry)
    with promotion_lock(store) as check_held:
        present = find_version(store, CHAMPION)
        past = history(store)
        candidates = [move.version for move in reversed(past)] if present is None else _before(past, present.version)
        for number in candidates:
            if find_version(store, number) is not None:
                check_held()
                _move(store, "rollback", number, present.version if present else None)
                was = f"version {present.version}" if present else "a deleted version"
                return f"{store.model} version {number} is champion again, instead of {was}"
    raise UserError(
        f"there is no earlier champion of '{store.model}' in {store.uri} to go back to; `vismem models list` shows all"
    )


def history(store: Store) -> list[Move]:
    """All moves of the champion alias, oldest first."""
    return moves(store.client.get_registered_model(store.model).tags) if versions(store) else []


def _predecessor(past: list[Move], version: str) -> str | None:
    """The champion that the version's last promotion replaced."""
    return next((m.previous for m in reversed(past) if m.action == "promote" and m.version == version), None)


def _before(past: list[Move], version: str) -> list[str]:
    """The champions before `version` along the promotions, nearest first; each version at most once."""
    chain = [version]
    while (previous := _predecessor(past, chain[-1])) is not None and previous not in chain:
        chain.append(previous)
    return chain[1:]


def _move(store: Store, action: str, version: str, previous: str | None) -> None:
    """Write the move down, then make it; after a kill in between, the line is there already and not written again."""
    now = datetime.now(UTC)
    move = Move(now.isoformat(), action, version, previous)
    if [replace(last, time=move.time) for last in history(store)[-1:]] != [move]:
        key = f"{HISTORY}{now.strftime('%Y%m%dT%H%M%S.%fZ')}"
        store.client.set_registered_model_tag(store.model, key, json.dumps(asdict(move)))
    store.client.set_registered_model_alias(store.model, CHAMPION, version)
