"""Where a trained model is: from the name that a user gives to the folder of what VisMem adds, and to its base.

A folder says in `base.json` which base it belongs to; one that stage1 or stage2 wrote has it beside it.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vismem.config import DEFAULT_BASE, Config, load_config
from vismem.errors import UserError
from vismem.files import read_json, write_json
from vismem.provenance import MANIFEST, sha256_folder, verify_manifest
from vismem.shipped import shipped

ADDED = "vismem.json"  # stands in every folder of what VisMem adds
REFERENCE = "base.json"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
REGISTERED = re.compile(r"models:/(?P<model>[^/@]+)[/@](?P<version>[^/@]+)")
WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Base:
    """A base as a folder refers to it: a hub id, what comes with VisMem, or a folder; `sha256` of its weights."""

    model: str
    sha256: str | None = None  # None for a hub id

    @property
    def everywhere(self) -> bool:
        """Whether other machines find it too."""
        return self.model == DEFAULT_BASE or bool(HUB_ID.fullmatch(self.model) and not Path(self.model).is_dir())

    def write(self, folder: Path) -> None:
        """Write the reference into the folder of what VisMem adds."""
        write_json(folder / REFERENCE, {"model": self.model, "weights_sha256": self.sha256})

    def place(self, beside: Path = Path()) -> str | Path:
        """What to load: a hub id or a folder. `beside` is the folder that refers to it.

        UserError where it is not on this machine, or has other weights.
        """
        folder = next((path for path in (beside / self.model, Path(self.model)) if path.is_dir()), None)
        if folder is None and self.model == DEFAULT_BASE:
            folder = shipped(DEFAULT_BASE)
        if folder is None and self.sha256 is None and HUB_ID.fullmatch(self.model):
            return self.model
        if folder is None:
            raise UserError(f"the base '{self.model}' is not on this machine: say where it is with base= (--base)")
        if self.sha256 and sha256_folder(folder, WEIGHTS) != self.sha256:
            raise UserError(f"{folder} has other weights than the base that the memory was trained on: give that one")
        return folder


def find_added(name: str | Path) -> Path:
    """The folder of what VisMem adds, verified by its manifest where it has one.

    `name` is a folder, a hub id, or `models:/NAME@ALIAS` or `models:/NAME/VERSION` of the MLflow registry. UserError
    where there is nothing of that name, or it is damaged.
    """
    folder = _folder_of(str(name))
    if (folder / MANIFEST).is_file() and (problems := verify_manifest(folder)):
        raise UserError(f"{folder} is damaged: {'; '.join(problems[:5])}: fetch or export it again")
    inside = folder / "vismem"  # of a bundle
    added = inside if (inside / ADDED).is_file() else folder
    if not (added / ADDED).is_file():
        raise UserError(f"{folder} holds no memory, {ADDED} is not there: give what stage1, stage2 or export wrote")
    return added


def find_base(added: Path, given: str | Path | None = None) -> tuple[Base, str | Path]:
    """The base of a folder of what VisMem adds: how the folder refers to it, and what to load (`Base.place`).

    `given`: hub id or folder, where it is not as the folder says. UserError where neither says, or it is not there.
    """
    beside = added.parent / "base"
    if (added / REFERENCE).is_file():
        named = read_json(added / REFERENCE)
        reference = Base(named["model"], named["weights_sha256"])
    elif (beside / "config.json").is_file():
        reference = Base(str(beside))
    elif given is not None:
        reference = Base(str(given))
    else:
        raise UserError(f"{added} does not say which base it belongs to ({REFERENCE}): name it with base= (--base)")
    if given is None:
        return reference, reference.place(added)
    return reference, Base(str(given), reference.sha256 if Path(given).is_dir() else None).place()


def _folder_of(name: str) -> Path:
    if name.startswith("models:/"):
        return _from_registry(name)
    for folder in (Path(name), shipped(name)):
        if folder.is_dir():
            return folder
    if HUB_ID.fullmatch(name):
        return _from_hub(name)
    raise UserError(f"no folder {name}: give a folder, a hub id, or models:/NAME@champion of the MLflow registry")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=[".gitattributes"]))
    except OSError as error:  # all of the hub's errors are such
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no folder {name}, and no model '{name}' from the hub ({reason})") from None


def _from_registry(name: str) -> Path:
    """Fetched once: the next call finds it in the cache."""
    from vismem.registry.fetch import fetch_bundle

    if (found := REGISTERED.fullmatch(name)) is None:
        raise UserError(f"'{name}' names no registered version: write models:/NAME@ALIAS or models:/NAME/VERSION")
    params = Path("params.yaml")
    config = load_config(params) if params.is_file() else Config()
    registry = config.registry.model_copy(update={"model_name": found["model"]})
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vismem"
    return fetch_bundle(registry, found["version"], cache)
