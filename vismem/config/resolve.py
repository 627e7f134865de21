"""The parameters of a run that is described in parts: a profile, sections as a form gives them, single overrides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vismem
from vismem.config.root import PROFILE_FOLDER, Config, merge, parse_config, read_profile
from vismem.errors import UserError

Values = dict[str, Any]


def resolve(
    profile: str = "",
    sections: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    root: Path | None = None,
) -> Config:
    """The typed parameters; what comes later wins: defaults, profile, sections where they differ from the defaults,
    overrides.

    `sections` are values by section, such as {"seed": 0, "stage1": {"steps": 30}}; a form hands over all of them, most
    as they were. So a value that equals the default leaves the profile's in force: to set it all the same, use
    `overrides`, values by dotted key: {"stage1.steps": 30}. Profiles lie in `root`/deploy/profiles; by default the
    working folder's or else the library's. UserError names every unknown key and every value that cannot be.
    """
    values = read_profile(root or _home(), profile) if profile else {}
    given = dict(sections or {})
    parse_config(given, "section parameters")  # apart, so that a fault is told with the place where it was made
    values = merge(values, _changed(given, defaults()))
    for key, value in (overrides or {}).items():
        values = _put(values, key.split("."), value, key)
    return parse_config(values, f"profile '{profile}' with sections and overrides" if profile else "parameters")


def defaults() -> Values:
    """All defaults, as `params.yaml` holds them."""
    values: Values = Config().model_dump(mode="json", by_alias=True)
    return values


def without_nulls(values: Any) -> Any:
    """The same plain values without keys that are null, for carriers that have none; null is such keys' default."""
    if isinstance(values, dict):
        return {key: without_nulls(value) for key, value in values.items() if value is not None}
    return [without_nulls(value) for value in values] if isinstance(values, list | tuple) else values


def _changed(given: Values, usual: Values) -> Values:
    """What differs from the defaults; lists are compared whole."""
    changed: Values = {}
    for key, value in given.items():
        old = usual.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if inner := _changed(value, old):
                changed[key] = inner
        elif value != old:
            changed[key] = value
    return changed


def _put(values: Values, path: list[str], value: Any, key: str) -> Values:
    """`values` with one more, at `path`."""
    first, *rest = path
    if not rest:
        return {**values, first: value}
    below = values.get(first, {})
    if not isinstance(below, dict):
        raise UserError(f"overrides: '{key}' goes below '{first}', which is a single value")
    return {**values, first: _put(below, rest, value, key)}


def _home() -> Path:
    here = Path.cwd()
    return here if (here / PROFILE_FOLDER).is_dir() else Path(vismem.__file__).parents[1]
