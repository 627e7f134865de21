"""Typed parameters: one frozen section per step, read from `params.yaml`, overlaid by a profile.

`params.yaml` holds every default but those that are `rare` (a test compares the two). Sources in brackets:
[paper] arXiv 2511.11007 with its section; [ours] a choice the paper leaves open; [measured] see docs/results.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from vismem.config.data import (
    SOURCES,
    DriftConfig,
    DvcPath,
    DvcSource,
    EasyVqaSource,
    InstructionsConfig,
    JsonlSource,
    LmuDataSource,
    LocalFiles,
    NlvrSource,
    PrepareConfig,
    ScenesSource,
    Severity,
    Source,
    ValidateConfig,
)
from vismem.config.release import (
    DeployConfig,
    EvaluateConfig,
    ExportConfig,
    GateConfig,
    PreflightConfig,
    RegistryConfig,
    SuiteConfig,
)
from vismem.config.section import Section, rare
from vismem.config.training import (
    DEFAULT_BASE,
    BaseConfig,
    BaselinesConfig,
    BaselinesGrpoConfig,
    GrpoConfig,
    GrpoStageConfig,
    InvocationConfig,
    MemoryConfig,
    Stage1Config,
    Stage2Config,
    SupervisedConfig,
    WarmStartConfig,
)
from vismem.errors import UserError, nearest
from vismem.shipped import shipped

PARAMS_FILE = Path("params.yaml")
PROFILE_FOLDER = "deploy/profiles"


class Config(Section):
    """All parameters."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice")
    cluster: Mapping[str, Any] = rare(
        {}, description="what the pods of a cluster ask for, as `vismem submit` compiles it into the pipeline"
    )
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
    suite: SuiteConfig = SuiteConfig()
    export: ExportConfig = ExportConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = RegistryConfig()
    deploy: DeployConfig = DeployConfig()
    drift: DriftConfig = DriftConfig()


def load_config(path: Path, profile: str | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read `path` (YAML), overlay the named profile and then `overrides`, which are as in `resolve`.

    The profile is of `deploy/profiles/` beside `path` or else VisMem's own. Where `path` is the working folder's
    `params.yaml` and there is none, the defaults hold. Raises UserError for another missing file, an unknown profile,
    an unknown key (naming the nearest right one) or a value of the wrong type.
    """
    above = [*([f"profile '{profile}'"] if profile else []), *(["--set"] if overrides else [])]
    where = f"{path} with {' and '.join(above)}" if above else str(path)
    return parse_config(load_params(path, profile, overrides), where)


def load_params(path: Path, profile: str | None = None, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The plain mapping behind `load_config`: the file's values with the profile's and the overrides laid over them."""
    values = {} if path == PARAMS_FILE and not path.exists() else _read_yaml(path)
    if path.exists() and not path.stat().st_size:  # as a shell leaves the file that a command's output goes to
        raise UserError(f"{path} is empty: restore it, or write the defaults by `vismem params --defaults > {path}`")
    if profile is not None:
        values = merge(values, _read_profile(path.parent, profile))
    return merge(values, _nested(overrides or {}))


def resolve(profile: str = "", overrides: Mapping[str, Any] | None = None, root: Path | None = None) -> Config:
    """The parameters of a Kubeflow run; what comes later wins: defaults, profile, overrides.

    `overrides` may hold all that params.yaml may, as nested sections or dotted keys: {"stage1": {"steps": 30}} and
    {"stage1.steps": 30} are the same. Profiles are those of `root`/deploy/profiles (default: the working folder's) or
    else VisMem's own. UserError names every unknown key and every value of the wrong type.
    """
    values = _read_profile(root or Path(), profile) if profile else {}
    where = f"profile '{profile}' with overrides" if profile else "overrides"
    return parse_config(merge(values, _nested(overrides or {})), where)


def parse_config(values: dict[str, Any], where: str = "params") -> Config:
    """Check a plain mapping and return the typed parameters. UserError lists every fault with its place."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(map(_explain, error.errors()))) from None


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another, key by key; a list is replaced whole, or in those items whose index is a key."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        items = {str(index): item for index, item in enumerate(old)} if isinstance(old, list) else {}
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = merge(old, value)
        elif isinstance(value, dict) and value and value.keys() <= items.keys():
            merged[key] = list(merge(items, value).values())
        else:
            merged[key] = value
    return merged


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with every dotted key as nested sections; later keys win."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        inner = _nested(value) if isinstance(value, Mapping) else value
        for part in reversed(str(key).split(".")):
            inner = {part: inner}
        nested = merge(nested, inner)
    return nested


def _read_profile(root: Path, profile: str) -> dict[str, Any]:
    """The plain values of a profile, laid over those of the profile that it `extends`.

    Profiles are those of `root`/deploy/profiles, and of VisMem's own those that have another name.

    UserError where there is no profile of that name, or where the extended one extends another.
    """
    folders = (shipped(PROFILE_FOLDER), root / PROFILE_FOLDER)  # the later wins
    files = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}

    def read(name: str) -> dict[str, Any]:
        if name not in files:
            raise UserError(f"unknown profile '{name}'{nearest(name, files)}; known: {', '.join(sorted(files))}")
        return _read_yaml(files[name])

    values = read(profile)
    if (below := values.pop("extends", None)) is None:
        return values
    extended = read(str(below))
    if "extends" in extended:
        raise UserError(f"profile '{profile}' extends '{below}', which extends '{extended['extends']}': name that one")
    return merge(extended, values)


class _Unique(yaml.SafeLoader):
    """Refuses a key that stands in a mapping twice, of which YAML keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As it stands there, before `<<` is merged. YAMLError that names the key and its line."""
        node, names = super().compose_mapping_node(anchor), set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' stands there twice", problem_mark=key.start_mark
                )
            names.add(key.value)
        return node


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no parameter file {path}: run in the project's root, or name one with --params")
    try:
        values = yaml.load(path.read_text(), _Unique) or {}
    except (yaml.YAMLError, ValueError) as error:  # UnicodeDecodeError is one
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of sections, not a {type(values).__name__}")
    return values


def _explain(fault: Any) -> str:
    """One of pydantic's faults in a sentence; for an unknown key with the nearest one of its section."""
    where = ".".join(str(part) for part in fault["loc"] if part not in SOURCES)
    *place, last = fault["loc"]
    if fault["type"] != "extra_forbidden":
        return f"'{where}': {fault['msg']} (got {fault['input']!r})"
    section: type[Section] = Config
    for part in place:  # section names, and for a source its index and kind
        field = section.by_key().get(part)
        inner = SOURCES.get(part) or (field and field.annotation)
        section = inner if isinstance(inner, type) and issubclass(inner, Section) else section
    above = where[: -len(str(last))]
    return f"unknown key '{where}'{nearest(str(last), section.by_key(), above)}"
