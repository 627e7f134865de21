"""The parameters of a run that names a profile and overrides single values, as a Kubeflow run does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vismem
from vismem.config.root import PROFILE_FOLDER, Config, merge, parse_config, read_profile


def resolve(profile: str = "", overrides: Mapping[str, Any] | None = None, root: Path | None = None) -> Config:
    """The typed parameters; what comes later wins: defaults, profile, overrides.

    `overrides` may hold all that params.yaml may, as nested sections or dotted keys: {"stage1": {"steps": 30}} and
    {"stage1.steps": 30} are the same. Profiles lie in `root`/deploy/profiles; by default the working folder's or else
    the library's. UserError names every unknown key and every value of the wrong type.
    """
    values = read_profile(root or _home(), profile) if profile else {}
    where = f"profile '{profile}' with overrides" if profile else "overrides"
    return parse_config(merge(values, _nested(overrides or {})), where)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with every dotted key as nested sections; later keys win."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        inner = _nested(value) if isinstance(value, Mapping) else value
        for part in reversed(key.split(".")):
            inner = {part: inner}
        nested = merge(nested, inner)
    return nested


def _home() -> Path:
    here = Path.cwd()
    return here if (here / PROFILE_FOLDER).is_dir() else Path(vismem.__file__).parents[1]
