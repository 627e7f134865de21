"""What the registry holds of the model, for `vismem models`.

A SQLite store's tables are read as they are, in milliseconds, where the import of MLflow alone takes seconds. MLflow's
client is asked for any other store, and where the tables are not those that this was written for; a test holds both to
the same answer.
"""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vismem.config import Config, RegistryConfig
from vismem.registry.versions import CHALLENGER, CHAMPION, Version, database, moves, tracking_uri, unknown_version

_OURS = "name = ? AND workspace = 'default'"


@dataclass(frozen=True)
class Listing:
    """All that the registry holds of a model: its versions, newest first, the numbers by alias, the model's tags."""

    versions: tuple[Version, ...]
    aliases: Mapping[str, str]
    tags: Mapping[str, str]

    def find(self, which: str) -> Version | None:
        """The version with that number or alias, or None."""
        number = which if which.isdecimal() else self.aliases.get(which)
        return next((item for item in self.versions if item.version == number), None)


def models(config: Config) -> list[dict[str, str]]:
    """One row per version, newest first: version, aliases, verdict, score, gain, n, created, git_commit."""
    listing = read_listing(config.registry)
    named = {alias: listing.aliases.get(alias) for alias in (CHAMPION, CHALLENGER)}
    return [
        {
            "version": item.version,
            "aliases": ", ".join(alias for alias, number in named.items() if number == item.version),
            **{name: item.tags.get(name, "") for name in ("verdict", "score", "gain", "n")},
            "created": datetime.fromtimestamp(item.created, UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "git_commit": item.tags.get("git_commit", "")[:10],
        }
        for item in listing.versions
    ]


def show(config: Config, which: str) -> dict[str, Any]:
    """All that is known of a version, given by number or alias. UserError where there is none of that name."""
    listing, name = read_listing(config.registry), config.registry.model_name
    version = listing.find(which)
    if version is None:
        raise unknown_version(which, name, tracking_uri(config.registry), listing.versions)
    history = [asdict(move) for move in moves(listing.tags) if version.version in (move.version, move.previous)]
    return {"name": name, **asdict(version), "history": history}


def read_listing(config: RegistryConfig) -> Listing:
    """What the store holds of the model; nothing where a SQLite store does not exist yet. UserError as `open_store`."""
    file = database(tracking_uri(config))
    if file is not None and not file.is_file():
        return Listing((), {}, {})
    try:
        return read_tables(file, config.model_name) if file is not None else ask_mlflow(config)
    except sqlite3.Error:
        return ask_mlflow(config)


def ask_mlflow(config: RegistryConfig) -> Listing:
    """What MLflow's client says of the model."""
    from vismem.registry.tracking import open_store, translate_mlflow_errors, versions

    with translate_mlflow_errors():
        store = open_store(config)
        if not (found := versions(store)):
            return Listing((), {}, {})
        model = store.client.get_registered_model(store.model)
        return Listing(tuple(found), {alias: str(number) for alias, number in model.aliases.items()}, dict(model.tags))


def read_tables(file: Path, name: str) -> Listing:
    """The same from the tables of a SQLite store. sqlite3.Error where they are others than MLflow 3.17 makes."""
    with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as tables:
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
        versions = tuple(_version(number, run_id, created, tags.get(number, {})) for number, run_id, created in rows)
        aliases = tables.execute(f"SELECT alias, version FROM registered_model_aliases WHERE {_OURS}", (name,))
        named = {alias: str(number) for alias, number in aliases}
        ours = tables.execute(f"SELECT key, value FROM registered_model_tags WHERE {_OURS}", (name,))
        return Listing(versions, named, dict(ours) if versions else {})


def _version(number: int, run_id: str | None, created: int | None, tags: Mapping[str, str]) -> Version:
    return Version(str(number), run_id or "", tags.get("model_id", ""), (created or 0) / 1000, tags)
