"""Puts the champion where the servers of a cluster read it: `python -m vismem.serving.publish --to DIR`.

DIR/releases/VERSION/    a model repository; replaced only where it is damaged
DIR/current              a link to the one that is served
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vismem.config import Config
from vismem.errors import UserError
from vismem.provenance import MANIFEST, sha256_file
from vismem.registry.champion import champion_version
from vismem.registry.runs import download_bundle
from vismem.registry.tracking import open_store, translate_mlflow_errors
from vismem.serving.command import run_command
from vismem.serving.repository import check_repository, repository_problems, write_model_repository


@translate_mlflow_errors()
def publish(config: Config, folder: Path) -> str:
    """Fetch the champion into `folder`, unless it is there undamaged, and make it current; return a line that says so.

    Servers that run load it, those that start take it. UserError where there is no champion, or the store's files are
    damaged; then nothing changes.
    """
    store = open_store(config.registry)
    champion = champion_version(store)
    if champion is None:
        raise UserError(f"'{store.model}' in {store.uri} has no champion yet: a version must pass the gate first")
    named = f"{store.model} version {champion.version}"
    model = config.deploy.model_name
    release, current = folder / "releases" / champion.version, folder / "current"
    bundle_manifest = release / model / champion.version / "bundle" / MANIFEST
    registered = bundle_manifest.is_file() and sha256_file(bundle_manifest) == champion.tags.get("manifest_sha256")
    intact = registered and not repository_problems(release)
    if intact and current.is_symlink() and current.resolve() == release.resolve():
        return f"{named} is current already"
    if not intact:
        partial = release.with_name(f"{champion.version}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        bundle = partial / "bundle"
        bundle.mkdir(parents=True)
        download_bundle(store, champion, bundle)
        write_model_repository(bundle, partial / "repository", model, int(champion.version))
        check_repository(partial / "repository")
        if release.exists():
            release.rename(partial / "damaged")
        (partial / "repository").rename(release)
        shutil.rmtree(partial)
    link = folder / "current.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(release.relative_to(folder))
    os.replace(link, current)
    pin = sha256_file(release / model / MANIFEST)
    return f"{named} is current in {folder} as {model}, manifest {pin}: servers load it"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line; return 0 if the champion is current, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m vismem.serving.publish", description=__doc__)
    parser.add_argument(
        "--to", dest="folder", type=Path, required=True, help="folder on a volume that the servers read"
    )
    return run_command(parser, arguments, publish)


if __name__ == "__main__":
    sys.exit(main())
