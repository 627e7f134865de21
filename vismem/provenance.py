"""Where an artifact came from: git commit, versions, parameters, data hash, and a sha256 manifest of its files."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vismem.config import Config
from vismem.errors import UserError, mask_credentials
from vismem.files import read_json, write_json

MANIFEST = "manifest.json"
ORIGIN = {  # tag: the environment variable that holds it
    "kfp_run_id": "KFP_RUN_ID",
    "image": "VISMEM_IMAGE",
    "dvc_experiment": "DVC_EXP_NAME",
    "dvc_baseline": "DVC_EXP_BASELINE_REV",
}
PACKAGES = (
    "vismem torch transformers accelerate tokenizers safetensors numpy pillow onnx onnxscript onnxruntime pyarrow"
)


def sha256_file(path: Path) -> str:
    """Hex sha256 of one file's bytes, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path, pattern: str = "**/*") -> str:
    """Hex sha256 over the relative names and hashes of the files below `folder` that match, in sorted order."""
    lines = [f"{name}\0{value}\n" for name, value in file_hashes(folder, pattern).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_hashes(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """`{relative POSIX path: sha256}` of the files below `folder` that match, sorted; the manifest itself left out."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: sha256_file(path) for name, path in names.items() if name != MANIFEST}


def write_manifest(folder: Path) -> Path:
    """Write `manifest.json` (`{"files": {relative path: sha256}}`) over everything in `folder`; return its path."""
    path = folder / MANIFEST
    write_json(path, {"files": file_hashes(folder)})
    return path


def verify_manifest(folder: Path) -> list[str]:
    """Problems of `folder` against its `manifest.json`, one line each; empty when every file is as it was written."""
    path = folder / MANIFEST
    try:
        expected = dict[str, str](read_json(path)["files"])
    except UserError as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError):
        return [f"{path} is damaged: it is not a JSON object with 'files'"]
    found = file_hashes(folder)
    missing = [f"{name} is missing" for name in expected if name not in found]
    changed = [f"{name} has changed" for name, value in expected.items() if found.get(name, value) != value]
    links = {path.relative_to(folder).as_posix() for path in folder.glob("**/*") if path.is_symlink() and path.is_dir()}
    unknown = [f"{name} is not in the manifest" for name in sorted(found.keys() | links) if name not in expected]
    return missing + changed + unknown


def check_manifest(folder: Path) -> None:
    """UserError where `verify_manifest` finds problems."""
    if problems := verify_manifest(folder):
        raise UserError(f"{folder} is damaged: {'; '.join(problems[:5])}: fetch or export it again")


def git_state(folder: Path | None = None) -> dict[str, Any]:
    """`{"commit": str | None, "dirty": bool | None}` of the checkout that holds `folder`.

    Without a folder: the checkout that this code runs from, else the one we stand in. Images without git pass the
    commit they were built from in VISMEM_GIT_COMMIT.
    """
    if commit := os.environ.get("VISMEM_GIT_COMMIT"):
        return {"commit": commit, "dirty": False}
    for place in (folder,) if folder else (Path(__file__).parent, Path()):
        if commit := git(place, "rev-parse", "HEAD"):
            return {"commit": commit, "dirty": bool(git(place, "status", "--porcelain", "--untracked-files=no"))}
    return {"commit": None, "dirty": None}


def origin_tags() -> dict[str, str]:
    """What of `ORIGIN` is known here: the tags that tell runs and versions apart by where they came from."""
    return {tag: os.environ[variable] for tag, variable in ORIGIN.items() if os.environ.get(variable)}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that an artifact's numbers depend on, where they are installed."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES.split():
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def lineage(config: Config, data: Path | None = None, inputs: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Everything needed to say where an artifact came from, as JSON values.

    `data`: the folder of clean shards, hashed into `data_sha256`; `inputs`: the folders of the steps that it was made
    from, each hashed. Without a folder its hash is None, so that a reader sees that it is not known. The parameters of
    what happens around an artifact (gate, registry, deploy) are left out.
    """
    params = config.model_dump(mode="json", by_alias=True, exclude={"gate", "registry", "deploy"})
    return {
        "git": git_state(),
        "data_sha256": sha256_folder(data, "**/*.parquet") if data else None,
        "inputs_sha256": {name: sha256_folder(folder) for name, folder in (inputs or {}).items()},
        "seed": config.seed,
        "params": json.loads(mask_credentials(json.dumps(params))),
        "versions": versions(),
    }


def git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
