"""What the registry holds of the model, for `vismem models`.

A SQLite store's tables are read as they are, in milliseconds, where the import of MLflow alone takes seconds. MLflow's
client is asked for any other store, and where the tables are not those that this was written for; a test holds both to
the same answer.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vismem.config import Config, RegistryConfig
from vismem.data.dvc_source import md5_here
from vismem.registry.ledger import Ledger, effective, ledger_model
from vismem.registry.versions import CHALLENGER, CHAMPION, Version, database, tracking_uri, unknown_version
from vismem.registry.view import BLOCKED, View

SHORTEST = 6  # characters of a hash that name it
_OURS = "name = ? AND workspace = 'default'"


def models(config: Config, data: str = "") -> list[dict[str, str]]:
    """A row per version trained on `data`, newest first: version, aliases, verdict, score, gain, n, created, commit."""
    view, _ = read_registry(config.registry)
    return [
        {
            "version": item.version,
            "aliases": ", ".join(alias for alias in (CHAMPION, CHALLENGER) if view.aliases.get(alias) == item.version),
            "verdict": BLOCKED if BLOCKED in item.tags else item.tags.get("verdict", ""),
            **{name: item.tags.get(name, "") for name in ("score", "gain", "n")},
            "created": datetime.fromtimestamp(item.created, UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "git_commit": item.tags.get("git_commit", "")[:10],
        }
        for item in (_trained_on(data, view.versions) if data else view.versions)
    ]


def _trained_on(data: str, versions: Sequence[Version]) -> list[Version]:
    """The versions whose data this project has in the revision `data`; where it has none, whose revision had that name.

    Also those of whose data `data` is the start of the commit, md5 or sha256.
    """

    def tags(version: Version, *names: str) -> list[str]:
        return [value for name in names for value in version.tags.get(f"data_{name}", "").split(", ") if value]

    here = md5_here(data, {path for version in versions for path in tags(version, "path")})

    def matches(version: Version) -> bool:
        if here & {*tags(version, "md5")} or (not here and data in tags(version, "rev")):
            return True
        hashes = tags(version, "commit", "md5", "sha256")
        return len(data) >= SHORTEST and any(value.startswith(data) for value in hashes)

    return [version for version in versions if matches(version)]


def show(config: Config, which: str) -> dict[str, Any]:
    """All that is known of a version, given by number or alias. UserError where there is none of that name."""
    (view, ledger), name = read_registry(config.registry), config.registry.model_name
    version = view.find(which)
    if version is None:
        raise unknown_version(which, name, tracking_uri(config.registry), view.versions)
    moves = [move for move in ledger.moves if version.version in (move.version, move.previous)]
    return {"name": name, **asdict(version), "history": [move.model_dump(exclude={"verdict"}) for move in moves]}


def read_registry(config: RegistryConfig) -> tuple[View, Ledger]:
    """What MLflow shows of the model, and its ledger; nothing where a SQLite store does not exist yet.

    Where a killed promotion left the two apart, the view is mended first. UserError as `open_store`.
    """
    file = database(tracking_uri(config))
    if file is not None and not file.is_file():
        return View((), {}), Ledger()
    if file is not None:
        with suppress(sqlite3.Error):
            view, ledger = read_tables(file, config.model_name)
            if not view.edits(ledger):
                return view, ledger
    return ask_mlflow(config)


def ask_mlflow(config: RegistryConfig) -> tuple[View, Ledger]:
    """The same from MLflow's client, mended."""
    from vismem.registry.champion import mend_view, read_view
    from vismem.registry.tracking import open_store, translate_mlflow_errors

    with translate_mlflow_errors():
        store = open_store(config)
        ledger = mend_view(store)
        return read_view(store), ledger


def read_tables(file: Path, name: str) -> tuple[View, Ledger]:
    """The same from the tables of a SQLite store, all of one moment, and not mended.

    sqlite3.Error where they are others than MLflow 3.17 makes.
    """
    with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as tables:
        tables.execute("BEGIN")  # or another's move comes between two of the questions
        aliases = tables.execute(f"SELECT alias, version FROM registered_model_aliases WHERE {_OURS}", (name,))
        view = View(_versions(tables, name), {alias: str(number) for alias, number in aliases})
        return view, Ledger(moves=effective(_versions(tables, ledger_model(name))))


def _versions(tables: sqlite3.Connection, name: str) -> tuple[Version, ...]:
    tags: dict[int, dict[str, str]] = {}
    for number, key, value in tables.execute(
        f"SELECT version, key, value FROM model_version_tags WHERE {_OURS}", (name,)
    ):
        tags.setdefault(number, {})[key] = value
    rows = tables.execute(
        "SELECT version, run_id, creation_time FROM model_versions "
        f"WHERE {_OURS} AND current_stage != 'Deleted_Internal' ORDER BY version DESC",
        (name,),
    )
    return tuple(
        Version(str(number), run_id or "", known.get("model_id", ""), (created or 0) / 1000, known)
        for number, run_id, created in rows
        for known in (tags.get(number, {}),)
    )
