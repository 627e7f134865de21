"""Fetches a registered version's bundle out of the store."""

from pathlib import Path

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from vismem.errors import UserError
from vismem.provenance import MANIFEST, sha256_file, verify_manifest
from vismem.registry.tracking import Store, Version, plain_faults


@plain_faults
def download_bundle(store: Store, version: Version, folder: Path) -> Path:
    """Put the bundle that `version` was registered with into `folder`, which must be there; return it.

    UserError where the store has lost it, or the files are not those that were registered.
    """
    model = store.client.get_logged_model(version.model_id)
    files = get_artifact_repository(model.artifact_location, store.uri, store.uri)
    files.download_artifacts("", str(folder))
    problems = verify_manifest(folder)
    if not problems and sha256_file(folder / MANIFEST) != version.tags.get("manifest_sha256"):
        problems = [f"{MANIFEST} is another than was registered"]
    if problems:
        raise UserError(
            f"the files of {store.model} version {version.version} in {store.uri} are damaged: "
            f"{'; '.join(problems[:5])}"
        )
    return folder
