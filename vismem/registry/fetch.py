"""Fetches a registered version's bundle for use outside the pipeline, once: a cache keeps it by its manifest's hash."""

import re
import sys
import tempfile
from pathlib import Path

from vismem.config import RegistryConfig
from vismem.errors import UserError
from vismem.provenance import MANIFEST, sha256_file, verify_manifest
from vismem.registry.champion import named_version
from vismem.registry.runs import download_bundle
from vismem.registry.signing import check_signature
from vismem.registry.tracking import PROGRESS_BAR, existing_store, translate_mlflow_errors
from vismem.services import environment


@translate_mlflow_errors()
def fetch_bundle(config: RegistryConfig, which: str, cache: Path) -> Path:
    """The folder in `cache` of the version with that number or alias.

    UserError where there is no such store or version, or its files are damaged there; what the cache has must be signed
    too, see `check_signature`, and is fetched again where it is damaged. An absent SQLite store is not made.
    """
    store = existing_store(config)
    version = named_version(store, which)
    if (hashed := version.tags.get("manifest_sha256")) is None:
        raise UserError(f"version {version.version} of '{store.model}' is none that `vismem register` made")
    if not re.fullmatch("[0-9a-f]{64}", hashed):
        raise UserError(f"version {version.version} of '{store.model}' has no sha256 in its tag manifest_sha256")
    folder = cache / hashed
    if _is_whole(folder):
        check_signature(store, version, folder)
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as made:
        fresh = Path(made) / "bundle"
        fresh.mkdir()
        with environment({PROGRESS_BAR: str(sys.stderr.isatty())}):
            download_bundle(store, version, fresh)
        try:
            if folder.is_dir() and not _is_whole(folder):
                folder.rename(Path(made) / "damaged")
            fresh.rename(folder)
        except OSError:
            if not _is_whole(folder):  # else another was quicker
                raise
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache holds the files that its name stands for."""
    return folder.is_dir() and not verify_manifest(folder) and sha256_file(folder / MANIFEST) == folder.name
