"""Where a trained model is: from the name that a user gives to the folder of what VisMem adds, and to its base.

A folder says in `base.json` which base it belongs to; one that stage1 or stage2 wrote has it beside it.
"""

import re
from pathlib import Path

from vismem.config import PARAMS_FILE, load_config
from vismem.errors import UserError
from vismem.files import user_cache
from vismem.hub import fetch
from vismem.models.reference import HUB_ID, REFERENCE, Base
from vismem.provenance import MANIFEST, check_manifest
from vismem.shipped import shipped

ADDED = "vismem.json"  # stands in every folder of what VisMem adds
REGISTERED = re.compile(r"models:/(?P<model>[^/@]+)[/@](?P<version>[^/@]+)")


def find_added(name: str | Path) -> Path:
    """The folder of what VisMem adds, verified by its manifest; only what a training wrote has none.

    `name` is a folder, a hub id, or `models:/NAME@ALIAS` or `models:/NAME/VERSION` of the MLflow registry. UserError
    where there is nothing of that name, or it is damaged.
    """
    folder = _folder_of(str(name))
    inside = folder / "vismem"  # of a bundle
    # One that names its base was saved with a manifest, or lies in a bundle.
    saved = (folder / REFERENCE).is_file() and not (folder.resolve().parent / MANIFEST).is_file()
    if saved or (inside / ADDED).is_file() or (folder / MANIFEST).is_file():
        check_manifest(folder)
    added = inside if (inside / ADDED).is_file() else folder
    if not (added / ADDED).is_file():
        raise UserError(f"{folder} holds no memory, {ADDED} is not there: give what stage1, stage2 or export wrote")
    return added


def find_base(added: Path, given: str | Path | None = None) -> tuple[Base, str | Path]:
    """The base of a folder of what VisMem adds: how the folder refers to it, and what to load (`Base.place`).

    `given`: hub id or folder, where it is not as the folder says. UserError where neither says, or it is not there.
    """
    beside = added.parent / "base"
    reference = Base.read(added)
    if reference is None and (beside / "config.json").is_file():
        reference = Base(str(beside))
    if reference is None and given is not None:
        reference = Base(str(given))
    if reference is None:
        raise UserError(f"{added} does not say which base it belongs to ({REFERENCE}): name it with base= (--base)")
    if given is None:
        return reference, reference.place(added)
    return reference, Base(str(given), reference.sha256).place()


def _folder_of(name: str) -> Path:
    if name.startswith("models:/"):
        return _from_registry(name)
    for folder in (Path(name), shipped(name)):
        if folder.is_dir():
            return folder
    if HUB_ID.fullmatch(name):
        return fetch(name)
    raise UserError(f"no folder {name}: give a folder, a hub id, or models:/NAME@champion of the MLflow registry")


def _from_registry(name: str) -> Path:
    """Fetched once: the next call finds it in the cache."""
    try:
        from vismem.registry.fetch import fetch_bundle
    except ModuleNotFoundError as error:
        raise UserError(f"'{name}' needs MLflow (no module {error.name}): pip install 'vismem[pipeline]'") from None
    if (found := REGISTERED.fullmatch(name)) is None:
        raise UserError(f"'{name}' names no registered version: write models:/NAME@ALIAS or models:/NAME/VERSION")
    registry = load_config(PARAMS_FILE).registry.model_copy(update={"model_name": found["model"]})
    return fetch_bundle(registry, found["version"], user_cache())
