"""All parameters, read from `params.yaml` and overlaid by a profile."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, Field, ValidationError

from vismem.config.data import SOURCES, PrepareConfig, ValidateConfig
from vismem.config.models import BaseConfig, InvocationConfig, MemoryConfig
from vismem.config.preflight import PreflightConfig
from vismem.config.release import (
    DeployConfig,
    EvaluateConfig,
    ExportConfig,
    GateConfig,
    RegistryConfig,
)
from vismem.config.section import Section
from vismem.config.training import BaselinesConfig, GrpoConfig, Stage1Config, Stage2Config
from vismem.errors import UserError

PROFILE_FOLDER = Path("deploy/profiles")


class Config(Section):
    """All parameters."""

    seed: int = Field(0, ge=0, description="seed of every random choice")
    preflight: PreflightConfig = PreflightConfig()
    prepare: PrepareConfig = PrepareConfig()
    validate_: ValidateConfig = Field(ValidateConfig(), alias="validate")
    base: BaseConfig = BaseConfig()
    memory: MemoryConfig = MemoryConfig()
    invocation: InvocationConfig = InvocationConfig()
    grpo: GrpoConfig = GrpoConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    baselines: BaselinesConfig = BaselinesConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = RegistryConfig()
    deploy: DeployConfig = DeployConfig()

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


def load_config(path: Path, profile: str | None = None) -> Config:
    """Read `path` (YAML) and overlay the named profile of `deploy/profiles/` beside it.

    Raises UserError for a missing file, an unknown profile, an unknown key (naming the nearest right one) or a value
    of the wrong type.
    """
    return parse_config(load_params(path, profile), str(path))


def load_params(path: Path, profile: str | None = None) -> dict[str, Any]:
    """The plain mapping behind `load_config`: the file's values with the profile's laid over them."""
    values = _read_yaml(path)
    return values if profile is None else merge(values, read_profile(path.parent, profile))


def read_profile(root: Path, profile: str) -> dict[str, Any]:
    """The plain values of a profile of `root`/deploy/profiles, laid over those of the profile that it `extends`.

    UserError where there is no profile of that name, or where the extended one extends another.
    """
    values = _read_yaml(_profile_file(root, profile))
    below = values.pop("extends", None)
    if below is None:
        return values
    extended = _read_yaml(_profile_file(root, str(below)))
    if "extends" in extended:
        raise UserError(f"profile '{profile}' extends '{below}', which extends '{extended['extends']}': name that one")
    return merge(extended, values)


def _profile_file(root: Path, profile: str) -> Path:
    folder = root / PROFILE_FOLDER
    file = folder / f"{profile}.yaml"
    if not file.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise UserError(f"unknown profile '{profile}'{_nearest(profile, known)}; {folder} has: {', '.join(known)}")
    return file


def parse_config(values: dict[str, Any], where: str = "params") -> Config:
    """Check a plain mapping and return the typed parameters. UserError lists every fault with its place."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(fault, values) for fault in error.errors()]
        raise UserError(f"{where}: " + "; ".join(lines)) from None


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another, key by key; lists are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no parameter file {path}: run in the project's root, or name one with --params")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of sections, not a {type(values).__name__}")
    return values


def _explain(fault: Any, values: dict[str, Any]) -> str:
    place = [str(part) for part in fault["loc"] if part not in SOURCES]
    where = ".".join(place)
    if fault["type"] != "extra_forbidden":
        return f"'{where}': {fault['msg']} (got {fault['input']!r})"
    return f"unknown key '{where}'{_nearest(place[-1], _keys_at(list(fault['loc'][:-1])))}"


def _keys_at(place: list[Any]) -> list[str]:
    """The names allowed in the section at `place`."""
    section: Any = Config
    for part in place:
        if section is Config or (isinstance(section, type) and issubclass(section, Section)):
            fields = {(field.alias or name): field for name, field in section.model_fields.items()}
            section = fields[part].annotation if part in fields else None
        elif part in SOURCES:
            section = SOURCES[part]
    if isinstance(section, type) and issubclass(section, Section):
        return [field.alias or name for name, field in section.model_fields.items()]
    return []


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
