"""Where a run happens: the project's root, or `runs/PROFILE/`, which DVC and the CLI share when a profile is named.

A profile's workspace holds its resolved `params.yaml`, a copy of `dvc.yaml`, links to what stages depend on, and its
own `dvc.lock`, `artifacts/` and MLflow store. DVC's settings and cache are the root's; its artifacts stay as they are.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vismem.config import Config, DvcSource, Section, load_config
from vismem.errors import UserError
from vismem.locks import lock_file
from vismem.params_file import render_params

RUNS = "runs"
PLACE = Path(".dvc") / "tmp" / "vismem"  # of a run's own files, and its lock; DVC and git ignore it
COPIED = ("dvc.yaml", ".dvcignore", ".dvc/.gitignore")
LONGEST_NAME = 100
LINKED = ("vismem", "assets", "deploy", "data")  # what stages depend on; dvc.yaml is the same in every workspace


def make_workspace(params: Path, profile: str | None, overrides: Mapping[str, Any] | None = None) -> Path:
    """Write or refresh the workspace of a profile, overrides, or both, beside the parameter file; return its folder.

    Files are touched only where their content changes. UserError as from `load_config`, and where a run is in the
    workspace, whose later steps would read what changed.
    """
    root = params.resolve().parent
    config = load_config(params, profile, overrides)
    folder = root / RUNS / workspace_name(profile, overrides or {})
    (folder / ".dvc").mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        link = folder / name
        if (root / name).is_dir() and not link.is_symlink():
            link.symlink_to(Path("..") / ".." / name)
    wanted = {
        "params.yaml": render_params(rebase(config, root, folder)),
        **{name: (root / name).read_text() for name in COPIED if (root / name).is_file()},
    }
    changed = [name for name, text in wanted.items() if not _holds(folder / name, text)]
    if changed:
        with lock_file(folder / PLACE / "lock", os.path.relpath(folder)):
            for name in changed:
                (folder / name).write_text(wanted[name])
    if find_spec("dvc") is not None:
        _derive_dvc_config(root, folder)
    return folder


def workspace_name(profile: str | None, overrides: Mapping[str, Any]) -> str:
    """PROFILE, with overrides PROFILE~KEY-VALUE~...: runs with other parameters do not replace each other's outputs.

    A hash stands for what a folder's name cannot hold.
    """
    values = sorted(f"{key}-{json.dumps(value, ensure_ascii=False, default=str)}" for key, value in overrides.items())
    plain = [value.replace('"', "") for value in values]
    kept = [re.sub(r"[^\w.-]+", "_", value) for value in plain]
    name = "~".join([profile or "params", *kept])
    if kept == plain and len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}~{hashlib.sha256('~'.join(values).encode()).hexdigest()[:8]}"


def rebase(config: Config, root: Path, folder: Path) -> Config:
    """The same parameters with every relative path, meant from `root`, written as seen from `folder`."""
    moved: Config = _rebase(config, root, folder)
    if not (root / config.base.model).is_dir():  # a hub id
        return moved
    model = _rebase(Path(config.base.model), root, folder).as_posix()
    return moved.model_copy(update={"base": moved.base.model_copy(update={"model": model})})


def _rebase(value: Any, root: Path, folder: Path) -> Any:
    """A parameter with the paths in it rewritten, except those below a linked folder: they read the same there."""
    if isinstance(value, DvcSource):  # the paths in it are the repository's
        local = (root / value.repo).is_dir() and not Path(value.repo).is_absolute()
        return value.model_copy(update={"repo": os.path.relpath(root / value.repo, folder)} if local else {})
    if isinstance(value, Section):
        return value.model_copy(update={name: _rebase(inner, root, folder) for name, inner in value})
    if isinstance(value, tuple):
        return tuple(_rebase(item, root, folder) for item in value)
    if not isinstance(value, Path) or value.is_absolute() or any(value.is_relative_to(name) for name in LINKED):
        return value
    return Path(os.path.relpath(root / value, folder))


def _derive_dvc_config(root: Path, folder: Path) -> None:
    """Give the workspace the root's DVC settings, private ones too (`config.local`), and the root's cache.

    Relative paths still name the same files, and who may read a file does not change. UserError for broken settings.
    """
    from dvc.config import Config as DvcConfig
    from dvc.config import ConfigError
    from dvc.config_schema import RelPath

    try:
        theirs, ours = (DvcConfig(str(place / ".dvc"), validate=False) for place in (root, folder))
    except ConfigError as error:
        raise UserError(f"DVC cannot read .dvc/config or .dvc/config.local in {root} or {folder}: {error}") from None
    wanted = {level: theirs.load_one(level) for level in ("repo", "local")}
    wanted["repo"]["core"]["no_scm"] = "true"  # the workspace is git-ignored and no repository of its own
    if "dir" not in theirs["cache"]:
        wanted["repo"]["cache"]["dir"] = RelPath(root / ".dvc" / "cache")
    for level, values in wanted.items():
        source, file = Path(theirs.files[level]), Path(ours.files[level])
        if source.is_file():
            file.open("a").close()  # there before any secret is in it
            file.chmod(source.stat().st_mode | stat.S_IWUSR)
        if ours.load_one(level) != values:
            with ours.edit(level, validate=False) as found:
                found.clear()
                found.update(values)


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text
