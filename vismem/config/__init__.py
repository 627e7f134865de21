"""Typed parameters: one frozen section per step, read from `params.yaml`, overlaid by a profile.

`params.yaml` holds every default but those that are `rare` (a test compares the two). Sources in brackets:
[paper] arXiv 2511.11007 with its section; [ours] a choice the paper leaves open; [measured] see docs/results.
"""

from vismem.config.data import (
    SOURCES,
    EasyVqaSource,
    JsonlSource,
    LmuDataSource,
    NlvrSource,
    PrepareConfig,
    ScenesSource,
    Source,
    ValidateConfig,
)
from vismem.config.models import DEFAULT_BASE, BaseConfig, InvocationConfig, MemoryConfig
from vismem.config.preflight import PreflightConfig
from vismem.config.release import (
    DeployConfig,
    EvaluateConfig,
    ExportConfig,
    GateConfig,
    RegistryConfig,
)
from vismem.config.resolve import resolve
from vismem.config.root import PROFILE_FOLDER, Config, load_config, load_params, merge, parse_config
from vismem.config.section import Section
from vismem.config.training import (
    BaselinesConfig,
    GrpoConfig,
    GrpoStageConfig,
    Stage1Config,
    Stage2Config,
    SupervisedConfig,
    WarmStartConfig,
)

__all__ = [
    "DEFAULT_BASE",
    "PROFILE_FOLDER",
    "SOURCES",
    "BaseConfig",
    "BaselinesConfig",
    "Config",
    "DeployConfig",
    "EasyVqaSource",
    "EvaluateConfig",
    "ExportConfig",
    "GateConfig",
    "GrpoConfig",
    "GrpoStageConfig",
    "InvocationConfig",
    "JsonlSource",
    "LmuDataSource",
    "MemoryConfig",
    "NlvrSource",
    "PreflightConfig",
    "PrepareConfig",
    "RegistryConfig",
    "ScenesSource",
    "Section",
    "Source",
    "Stage1Config",
    "Stage2Config",
    "SupervisedConfig",
    "ValidateConfig",
    "WarmStartConfig",
    "load_config",
    "load_params",
    "merge",
    "parse_config",
    "resolve",
]
