"""What `vismem serve` serves: the champion that the ledger names."""

import time
from collections.abc import Callable
from pathlib import Path

from vismem.config import Config
from vismem.errors import UserError
from vismem.provenance import MANIFEST, sha256_file
from vismem.registry.ledger import Ledger
from vismem.registry.listing import read_registry
from vismem.registry.view import View
from vismem.serving.repository import without_graphs

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0  # seconds


def champion_repository(config: Config, artifacts: Path) -> Path:
    """The champion's model repository: the one of `deploy`, or fetched into `artifacts/champion` where that is another.

    Before there is a champion it is that of `deploy`, for trying out. UserError as `publish`.
    """
    return _repository(config, artifacts, *read_registry(config.registry))


def _repository(config: Config, artifacts: Path, view: View, ledger: Ledger) -> Path:
    deployed = artifacts / "deploy" / "model_repository"
    if ledger.champion is None:
        if (artifacts / "deploy" / "smoke.json").is_file() and not deployed.is_dir():
            raise UserError(without_graphs(artifacts / "export"))
        return deployed
    manifest = deployed / config.deploy.model_name / ledger.champion / "bundle" / MANIFEST
    version = ledger.own(view.find(ledger.champion))
    if version and manifest.is_file() and sha256_file(manifest) == version.tags.get("manifest_sha256"):
        if config.registry.public_key is not None:
            from vismem.registry.signing import check_signature
            from vismem.registry.tracking import open_store

            check_signature(open_store(config.registry), version, manifest.parent)
        return deployed
    from vismem.serving.publish import publish

    return publish(config, artifacts / "champion").repository


def follower(config: Config, artifacts: Path) -> Callable[[], Path]:
    """`champion_repository`, to be asked every few seconds: fetched files are verified when the ledger has moved.

    What fails is tried again after FIRST_PAUSE seconds, and then twice as many each time: it may be fetched whole.
    """
    fetched: dict[int, Path] = {}  # by the ledger's revision
    failed: dict[int, tuple[str, float, float]] = {}  # by the same: why, until when, and the pause

    def champion() -> Path:
        view, ledger = read_registry(config.registry)
        found = fetched.get(ledger.revision)
        if found is None or not found.is_dir():
            said, until, pause = failed.get(ledger.revision, ("", 0.0, FIRST_PAUSE))
            if time.monotonic() < until:
                raise UserError(said)
            failed.clear()
            try:
                found = _repository(config, artifacts, view, ledger)
            except (UserError, OSError) as error:
                failed[ledger.revision] = str(error), time.monotonic() + pause, min(2 * pause, LONGEST_PAUSE)
                raise
            fetched.clear()
            if found.is_relative_to(artifacts / "champion"):  # that of `deploy` may be replaced
                fetched[ledger.revision] = found
        return found

    return champion
