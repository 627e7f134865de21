"""Puts the champion where servers read it: DIR/releases/VERSION-CODE, a model repository, replaced only where damaged.

CODE is the start of a hash of the bundle and of what VisMem writes beside it: another VisMem, or another bundle under
the same number (an older database was restored), is another release, while servers read on in theirs.
"""

import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vismem.config import Config
from vismem.errors import UserError
from vismem.locks import lock_folder
from vismem.provenance import MANIFEST, sha256_file
from vismem.registry.champion import champion_version
from vismem.registry.runs import download_bundle
from vismem.registry.signing import check_signature
from vismem.registry.tracking import open_store, translate_mlflow_errors
from vismem.serving.repository import (
    check_repository,
    code_hash,
    has_own_code,
    repository_problems,
    write_model_repository,
)

PATIENCE = 3600.0  # seconds that one run waits for another that fetches
CODE = 8  # characters of a hash


@dataclass(frozen=True)
class Published:
    """A released version as servers read it."""

    version: str
    repository: Path
    bundle: Path
    manifest: str  # the hash of the model's manifest, see `repository.MANIFEST_VARIABLE`


@translate_mlflow_errors()
def publish(config: Config, folder: Path) -> Published:
    """Fetch the champion into `folder`, unless it is there undamaged.

    UserError where there is no champion, or the store's files are damaged or not signed; then nothing changes.
    """
    store = open_store(config.registry)
    champion = champion_version(store)
    if champion is None:
        raise UserError(f"'{store.model}' in {store.uri} has no champion yet: a version must pass the gate first")
    model = config.deploy.model_name
    registered = champion.tags.get("manifest_sha256")
    code = sha256(f"{code_hash(model)}{registered}".encode()).hexdigest()[:CODE]
    release = folder / "releases" / f"{champion.version}-{code}"
    bundle = release / model / champion.version / "bundle"
    with lock_folder(folder, PATIENCE):
        for left in release.parent.glob("*.partial"):  # by a run that was killed
            shutil.rmtree(left)
        intact = (bundle / MANIFEST).is_file() and sha256_file(bundle / MANIFEST) == registered
        if intact and not repository_problems(release) and has_own_code(release, model, champion.version):
            check_signature(store, champion, bundle)
        else:
            partial = release.with_name(f"{release.name}.partial")
            (partial / "bundle").mkdir(parents=True)
            download_bundle(store, champion, partial / "bundle")
            write_model_repository(partial / "bundle", partial / "repository", model, int(champion.version))
            check_repository(partial / "repository")
            if release.exists():
                release.rename(partial / "damaged")
            (partial / "repository").rename(release)
            shutil.rmtree(partial)
    return Published(champion.version, release, bundle, sha256_file(release / model / MANIFEST))


@translate_mlflow_errors()
def is_champion(config: Config, version: str) -> bool:
    """Whether the ledger says so now."""
    champion = champion_version(open_store(config.registry))
    return champion is not None and champion.version == version
