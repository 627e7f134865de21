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


def _repository(config: Config, artifacts: Path, view: View, ledger: Ledger) -> Path:
    """The champion's model repository: the one of `deploy`, or fetched into `artifacts/champion` where that is another.

    Before there is a champion it is that of `deploy`, for trying out. UserError as `publish`.
    """
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
    """The champion's `_repository`, asked every few seconds: fetched files are verified when the ledger has moved.

    What fails is tried again after FIRST_PAUSE seconds, and then twice as many each time: it may be fetched whole.
    """
    fetched: tuple[int, Path] | None = None  # the ledger's revision then, and what was fetched
    failed: tuple[int, str, float, float] | None = None  # the revision, why, until when, and the next pause

    def champion() -> Path:
        nonlocal fetched, failed
        view, ledger = read_registry(config.registry)
        if fetched and fetched[0] == ledger.revision and fetched[1].is_dir():
            return fetched[1]
        pause = FIRST_PAUSE
        if failed and failed[0] == ledger.revision:
            _, said, until, pause = failed
            if time.monotonic() < until:
                raise UserError(said)
        failed = None
        try:
            found = _repository(config, artifacts, view, ledger)
        except (UserError, OSError) as error:
            failed = ledger.revision, str(error), time.monotonic() + pause, min(2 * pause, LONGEST_PAUSE)
            raise
        # that of `deploy` may be replaced
        fetched = (ledger.revision, found) if found.is_relative_to(artifacts / "champion") else None
        return found

    return champion
