"""Puts the champion where the servers of a cluster read it: `python -m vismem.serving.publish --to DIR`.

DIR/releases/VERSION/    a model repository; never changed once it is there
DIR/current              a link to the one that is served
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vismem.config import Config, load_config
from vismem.errors import UserError
from vismem.export.triton import write_model_repository
from vismem.registry.download import download_bundle
from vismem.registry.tracking import CHAMPION, aliased, open_store, plain_faults


@plain_faults
def publish(config: Config, folder: Path) -> str:
    """Fetch the champion into `folder`, unless it is there, and make it current; return a line that says so.

    Servers that run keep the version that they have; those that start take the current one. UserError where there is
    no champion, or the store's files are damaged; then nothing changes.
    """
    store = open_store(config.registry)
    champion = aliased(store, CHAMPION)
    if champion is None:
        raise UserError(f"'{store.model}' in {store.uri} has no champion yet: a version must pass the gate first")
    named = f"{store.model} version {champion.version}"
    release = folder / "releases" / champion.version
    current = folder / "current"
    if release.is_dir() and current.is_symlink() and current.resolve() == release.resolve():
        return f"{named} is current already"
    if not release.is_dir():
        partial = release.with_name(f"{champion.version}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        bundle = partial / "bundle"
        bundle.mkdir(parents=True)
        download_bundle(store, champion, bundle)
        model = config.deploy.model_name
        write_model_repository(bundle, partial / "repository", model, int(champion.version))
        (partial / "repository").rename(release)
        shutil.rmtree(partial)
    link = folder / "current.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(release.relative_to(folder))
    os.replace(link, current)
    return f"{named} is current in {folder}: servers that start from now on serve it"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line; return 0 if the champion is current, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m vismem.serving.publish", description=__doc__)
    parser.add_argument("--to", type=Path, required=True, help="the folder, on a volume that the servers read")
    parser.add_argument("--params", type=Path, help="parameter file; default: the parameters' defaults")
    options = parser.parse_args(arguments)
    try:
        print(publish(load_config(options.params) if options.params else Config(), options.to))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
