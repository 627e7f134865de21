"""Fetches a registered version's bundle for use outside the pipeline, once: a cache keeps it by its manifest's hash."""

import os
import sys
import tempfile
from pathlib import Path

from vismem.config import RegistryConfig
from vismem.errors import UserError
from vismem.registry.champion import champion_version, mend_view
from vismem.registry.runs import download_bundle
from vismem.registry.tracking import find_version, open_store, translate_mlflow_errors, versions
from vismem.registry.versions import CHAMPION, database, tracking_uri, unknown_version
from vismem.services import environment


@translate_mlflow_errors()
def fetch_bundle(config: RegistryConfig, which: str, cache: Path) -> Path:
    """The folder in `cache` of the version with that number or alias.

    UserError where there is no such store or version, or its files are damaged. An absent SQLite store is not made.
    """
    uri = tracking_uri(config)
    if (file := database(uri)) and not file.is_file():
        raise UserError(f"no MLflow registry {uri}: go to the project's folder, or set MLFLOW_TRACKING_URI")
    store = open_store(config)
    ledger = mend_view(store)
    version = champion_version(store, ledger) if which == CHAMPION else find_version(store, which)
    if version is None:
        raise unknown_version(which, store.model, store.uri, versions(store))
    folder = cache / version.tags["manifest_sha256"]
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            fresh = Path(made) / "bundle"
            fresh.mkdir()
            with environment({"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": str(sys.stderr.isatty())}):
                download_bundle(store, version, fresh)
            os.rename(fresh, folder)
    return folder
